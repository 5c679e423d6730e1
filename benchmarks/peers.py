"""The job `peers`: bnfast beside what torch.compile generates for the same expression, without a GPU. Both
are compiled for sm_90, executed against fp64, counted, and modelled by the same constants."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import model, peer_tables, suites
from benchmarks.cases import of_network
from benchmarks.layers import QUICK, Run
from benchmarks.peer_tables import SHORT
from benchmarks.records import Record, frame
from benchmarks.session import Session, as_text, begin, paragraph, progress, section
from benchmarks.suites import Network
from benchmarks.timing import one_line
from codegen import SMS, why_not_counted
from codegen.cases import DIRECTIONS, Case

BATCH = {"resnet50": 32, "small": 4, "groupnorm": 2, "layernorm": 4096}
NETWORKS = {"resnet50": suites.RESNET50, "small": suites.SMALL, "groupnorm": suites.SDXL_UNET}
WIDTHS = (768, 1024, 4096, 8192)
COLUMNS = """\
model, unstarved, sums: bnfast's time over the peer's, below 1 where bnfast is faster, by three readings of
the same counts: benchmarks/model.py with everything; without waiting for loads and barriers; and the sum of
bytes, gaps between launches, wavefronts of shared memory and what last programs do. Trust a ratio where the
three agree. a/b is bnfast/peer. us: the first reading. read T, written T: bytes that a launch moves at least
once, in sectors, in T, the size of x; kept T: of what is read, what an earlier launch left in L2; L2 T: what
is asked of L2. apart: from fp64, relative. effic.: the useful share of the sectors. instr: about how many
machine instructions a thread issues for 16 bytes. kwavefr: thousands of wavefronts of shared memory.
programs: the fewest of a launch that moves much. atomics: instructions that add floats."""

CONSTANTS = (
    f"Assumed: {model.COPY_RATE / 1e12:g} TB/s of memory, {model.L2_RATE / 1e12:g} of L2, which keeps "
    f"{model.L2_KEEPS / 1e6:g} MB; {model.GAP:g} us from launch to launch; {SMS} SMs at "
    f"{model.CLOCK / 1e3:g} GHz that issue {model.SLOTS} instructions a cycle; the others are in model.py."
)
AFTER = ("relu", False)


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
    from benchmarks import inductor, sides  # need Triton

    asked = [each for case in todo for each in dict.fromkeys((case, sides.reduced(case)))]
    answers = inductor.generated(asked)
    for case in todo:
        whole = next(answers)
        yield whole, whole if sides.reduced(case) == case else next(answers)


@dataclasses.dataclass
class Found:
    """What is known of the cases so far: a line for each side and direction, and one for each launch; who
    cannot be compared, and why; and, on a GPU, records of measured times."""

    lines: list[pd.DataFrame] = dataclasses.field(default_factory=list)
    launches: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    records: list[Record] = dataclasses.field(default_factory=list)

    def add(self, case: Case, sources: list[str] | str, small: list[str] | str) -> None:
        """Both sides of a case. sources, small: what Inductor makes of it and of the reduced one, or why it
        makes nothing."""
        from benchmarks import sides  # needs Triton

        for name in (peer_tables.OURS, "inductor"):
            try:
                if name == peer_tables.OURS:
                    side = sides.ours(case)
                elif isinstance(sources, str) or isinstance(small, str):
                    self.notes.append(f"{name}, {case}: {sources if isinstance(sources, str) else small}")
                    continue
                else:
                    side = sides.of_inductor(case, sources, small)
            except (AssertionError, NotImplementedError, RuntimeError) as e:
                self.notes.append(f"{name}, {case}: {one_line(e)}")
                continue
            own = [peer_tables.line(case, side, direction) for direction in DIRECTIONS]
            self.lines.append(peer_tables.frame(case, own))
            for direction in DIRECTIONS:
                self.launches += peer_tables.launches(case, side, direction)

    def all(self) -> pd.DataFrame:
        every = pd.concat(self.lines, ignore_index=True) if self.lines else pd.DataFrame({"provider": []})
        return peer_tables.timed(every, frame(self.records)) if self.records else every

    def keep(self, folder: Path) -> None:
        """Files of all of it."""
        self.all().to_csv(folder / "peers.csv", index=False)
        pd.DataFrame(self.launches).to_csv(folder / "launches.csv", index=False)


def known(todo: Sequence[Case]) -> pd.DataFrame:
    """What bytes and launches alone take those who are not run, in microseconds for each BatchNorm + ReLU."""
    plain = [case for case in todo if case.norm == "BatchNorm" and (case.activation, case.residual) == AFTER]
    rows = [
        {
            "known, not run": f"{each.name} {SHORT[each.layout]} {SHORT[each.direction]}",
            "launches": each.launches, "T": f"{each.passes:g}",
            **{
                f"{case.shape[1]} x {case.shape[2]}":
                f"{model.uncounted(int(each.passes * case.x_bytes), each.launches).all:.1f}"
                for case in plain if case.layout == each.layout
            },
        }
        for each in KNOWN if any(case.layout == each.layout for case in plain)
    ]  # fmt: skip
    return pd.DataFrame(rows).fillna("-")


def show(session: Session, found: Found, todo: Sequence[Case]) -> str:
    """Everything that was found; gives the verdict."""
    every = found.all()
    both = peer_tables.compared(every)
    section("bnfast / peer, the worst first: modelled for an H200", f"{COLUMNS} {CONSTANTS}")
    print(as_text(peer_tables.ratios(both)))
    print(f"\n{as_text(peer_tables.counts(both))}")
    floors = known(todo)
    if len(floors):
        section("ATen and cuDNN: known bytes and launches, at the copy rate; a floor")
        print(as_text(floors))
    for note in (*found.notes, *peer_tables.wrong(every)):
        paragraph(note)
    session.draw(lambda: peer_tables.draw(session.folder / "peers.png", both))
    paragraph(f"Behind by all three readings: {peer_tables.agreed(both)} of {len(both)}.")
    return peer_tables.verdict(both)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    session = begin(options, lacking, "bnfast beside torch.compile, executed and counted without a GPU")
    why_not = why_not_counted()
    if why_not is not None:
        session.note("peers", "NOT RUN", why_not)
        return session.close()
    todo, found = cases(options.suite, options.batch, options.layout), Found()
    timing = Run(session, QUICK, ["compile"], session.folder / "layers.csv") if session.gpu else None
    pairs = zip(todo, generated(todo), strict=True)
    for case, (sources, small) in progress(pairs, total=len(todo), desc="executing and counting"):
        found.add(case, sources, small)
        if timing is not None and case.norm != "LayerNorm":  # which has no baselines
            found.records += timing.case(case)
        found.keep(session.folder)
    every = found.all()
    if every["provider"].nunique() < 2:
        session.note("peers", "NOT RUN", "; ".join(found.notes))
        return session.close()
    verdict = show(session, found, todo)
    wrong = peer_tables.wrong(every[every["provider"] == peer_tables.OURS])
    session.note("peers", "FAIL" if wrong else "DONE", f"{len(todo)} layers, executed and counted")
    code = session.close()
    print(verdict)
    return code
