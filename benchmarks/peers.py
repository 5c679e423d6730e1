"""The job `peers`: bnfast beside what torch.compile generates for the same expression, without a GPU. Both
are compiled for sm_90, executed against fp64, counted, and modelled by the same constants."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import pandas as pd
import torch

from benchmarks import inductor, model, peer_tables, sides, suites
from benchmarks.cases import of_network
from benchmarks.session import Session, as_text, begin, paragraph, progress, section
from benchmarks.suites import Network
from benchmarks.timing import one_line
from codegen import why_not_counted
from codegen.cases import DIRECTIONS, Case

BATCH = {"resnet50": 32, "small": 4, "groupnorm": 2, "layernorm": 4096}
NETWORKS = {"resnet50": suites.RESNET50, "small": suites.SMALL, "groupnorm": suites.SDXL_UNET}
WIDTHS = (768, 1024, 4096, 8192)
COLUMNS = """\
model, unstarved, sums: bnfast's time over the peer's, below 1 where bnfast is faster, by three readings of
the same counts: benchmarks/model.py with everything; without waiting for loads and barriers; and the sum of
bytes, gaps between launches, wavefronts of shared memory and what last programs do. Trust a ratio where the
three agree. a/b is bnfast/peer. us: the first reading. read T, written T: bytes that a launch moves at least
once, in sectors, in T, the size of x; kept T: of what is read, what an earlier launch left in L2; L2 T: what is
asked of L2. apart: from fp64, relative. effic.: the useful share of the sectors. instr: about how many
machine instructions a thread issues for 16 bytes. kwavefr: thousands of wavefronts of shared memory.
programs: the fewest of a launch that moves much. atomics: instructions that add floats."""


@dataclasses.dataclass(frozen=True)
class Known:
    """What somebody who is not run here is known to do for BatchNorm + ReLU: launches, and bytes in T."""

    name: str
    layout: str
    direction: str
    launches: int
    passes: float


KNOWN = (
    Known("ATen, then ReLU", "contiguous", "forward", 5, 5),
    Known("ATen, then ReLU", "contiguous", "backward", 2, 8),
    Known("ATen, then ReLU", "channels_last", "forward", 6, 5),
    Known("ATen, then ReLU", "channels_last", "backward", 4, 8),
    Known("cuDNN, then ReLU (fp16)", "channels_last", "forward", 3, 4),
    Known("cuDNN, then ReLU (fp16)", "channels_last", "backward", 2, 6),
    Known("cuDNN, fused graph (fp16)", "channels_last", "forward", 1, 2.06),
    Known("cuDNN, fused graph (fp16)", "channels_last", "backward", 1, 3.06),
)


def cases(suite: str, batch: int | None, layout: str | None) -> list[Case]:
    """Each different layer of a suite, in bf16. batch: of LayerNorm the rows; None: BATCH's."""
    batch = batch or BATCH[suite]
    if suite == "layernorm":
        return [Case("LayerNorm", (batch, width), 0, torch.bfloat16, False) for width in WIDTHS]
    network: Network = dataclasses.replace(NETWORKS[suite], batch=batch)
    layouts = suites.LAYOUTS if layout == "both" else (layout or network.layout,)
    return [
        case
        for each in layouts
        for case in of_network(suite, network, torch.bfloat16, each == "channels_last")
    ]


def generated(todo: Sequence[Case]) -> Iterator[tuple[list[str] | str, list[str] | str]]:
    """For each case what Inductor makes of it and of the one that is executed whole."""
    asked = [each for case in todo for each in dict.fromkeys((case, sides.reduced(case)))]
    answers = inductor.generated(asked)
    for case in todo:
        whole = next(answers)
        yield whole, whole if sides.reduced(case) == case else next(answers)


def refused(e: Exception) -> str:
    return f"{type(e).__name__}: {one_line(e)}"


def lines(case: Case, sources: list[str] | str, small: list[str] | str) -> tuple[pd.DataFrame, list[str]]:
    """Of both sides, and why one is missing."""
    found, notes = [], []
    for name in (peer_tables.OURS, "inductor"):
        try:
            if name == peer_tables.OURS:
                side = sides.ours(case)
            elif isinstance(sources, str) or isinstance(small, str):
                notes.append(f"inductor, {case}: {sources if isinstance(sources, str) else small}")
                continue
            else:
                side = sides.of_inductor(case, sources, small)
            found += [peer_tables.line(case, side, direction) for direction in DIRECTIONS]
        except (AssertionError, NotImplementedError, RuntimeError) as e:
            notes.append(f"{name}, {case}: {refused(e)}")
    return peer_tables.frame(case, found), notes


def known(todo: Sequence[Case]) -> pd.DataFrame:
    """What bytes and launches alone take those who are not run: a floor."""
    rows = [
        {
            "known, not run": each.name, "case": f"{case.shape[0]}x{case.shape[1]} x {case.shape[2]}",
            "direction": each.direction, "launches": each.launches, "T": f"{each.passes:g}",
            "floor us": f"{model.uncounted(int(each.passes * case.x_bytes), each.launches).all:.1f}",
        }
        for case in todo
        if case.norm == "BatchNorm" and case.activation == "relu" and not case.residual
        for each in KNOWN
        if each.layout == case.layout
    ]  # fmt: skip
    return pd.DataFrame(rows)


def show(session: Session, found: pd.DataFrame, todo: Sequence[Case], notes: Sequence[str]) -> str:
    """Everything that was found, and the verdict."""
    both = peer_tables.compared(found)
    section("bnfast / peer, the worst first: modelled, nothing is measured", COLUMNS)
    print(as_text(peer_tables.ratios(both)))
    print(f"\n{as_text(peer_tables.counts(both))}")
    floors = known(todo)
    if len(floors):
        section("ATen and cuDNN: known bytes and launches, at the copy rate; a floor")
        print(as_text(floors))
    for note in (*notes, *peer_tables.wrong(found)):
        paragraph(note)
    session.draw(lambda: peer_tables.draw(session.folder / "peers.png", both))
    paragraph(f"By all three readings behind: {peer_tables.agreed(both)} of {len(both)}.")
    return peer_tables.verdict(both)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    session = begin(options, lacking, "bnfast beside torch.compile, executed and counted without a GPU")
    why_not = why_not_counted()
    if why_not is not None:
        session.note("peers", "NOT RUN", why_not)
        return session.close()
    todo, found, notes = cases(options.suite, options.batch, options.layout), [], []
    pairs = zip(todo, generated(todo), strict=True)
    for case, (sources, small) in progress(pairs, total=len(todo), desc="executing and counting"):
        own, missing = lines(case, sources, small)
        found.append(own)
        notes += missing
        pd.concat(found).to_csv(session.folder / "peers.csv", index=False)
    all_found = pd.concat(found, ignore_index=True)
    if all_found.empty or all_found["provider"].nunique() < 2:
        session.note("peers", "NOT RUN", "; ".join(notes))
        return session.close()
    verdict = show(session, all_found, todo, notes)
    wrong = len(peer_tables.wrong(all_found[all_found["provider"] == peer_tables.OURS]))
    session.note("peers", "FAIL" if wrong else "DONE", f"{len(todo)} layers, executed and counted")
    code = session.close()
    print(verdict)
    return code
