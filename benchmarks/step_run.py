"""The job `step`: a whole training step of ResNet-50, with torch.nn, torch.compile and bnfast."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks import model_step, records, report
from benchmarks.model_stage import MODES, Effort
from benchmarks.model_variants import COMPILED, PLAIN, TORCH, Task, Variant
from benchmarks.records import MEASURED, Record
from benchmarks.session import Session, begin

PART = "step"
TIMES = ("variant", "mode", "ms", "quartiles", "of torch", "norms", "peak MB", "apart", "allowed")
LOSSES = ("variant", "mode", "apart", "allowed")
ABOUT = (
    "Forward, loss, backward and a fused SGD with momentum; a graph has all of it in one CUDA graph. ms: the "
    "median of a step. of torch: its time in those of torch, in the same mode. norms: the share that is gone "
    "where nn.Identity stands for each norm."
)
ABOUT_LOSSES = (
    "apart: the largest relative difference of the losses from torch's eager ones over 20 steps; allowed: "
    "three times what torch's own differ by when the batch comes in another order."
)
ON_A_CPU = (
    "Without a GPU there is no step time of ResNet-50, no peak memory, no CUDA graph, and nothing that "
    "torch.compile, which takes minutes for it, could show. What can be shown is that a converted and a "
    "fused network train as torch's does: a tiny one here, in fp64, where rounding hides nothing."
)
TINY_BATCH, TINY_EFFORT = 8, Effort(rounds=3, steps=1)
Stages = tuple[Sequence[Variant], ...]


def plan(session: Session, batches: Sequence[int]) -> tuple[Task, Sequence[int], Stages, Effort]:
    """What is trained here, in which stages, and how often."""
    if session.gpu:
        return Task(session.device), batches, (PLAIN, COMPILED), Effort()
    tiny = Task(session.device, torch.float64, width=8, classes=10, image=64)
    with_norms = tuple(variant for variant in PLAIN if variant.norms)
    return tiny, (TINY_BATCH,), (with_norms,), TINY_EFFORT


@contextmanager
def threads(session: Session) -> Iterator[None]:
    """One on a CPU: tensors so small gain nothing by more, and on a busy machine threads that wait for one
    another take ten times as long."""
    before = torch.get_num_threads()
    try:
        if not session.gpu:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def rows(lines: Sequence[Record]) -> list[dict[str, str]]:
    """Of one batch size, in the order measured, by the names of TIMES. Each is held against the torch before
    it, as that was measured along with it, and against the network without norms of its own kind."""
    bare = {(line.variant, line.mode): line.us for line in lines if line.norm == "none"}
    torchs: dict[str, float] = {}
    found = []
    for line in lines:
        row = dict.fromkeys(TIMES, "")
        row["variant"], row["mode"] = line.variant + ", no norms" * (line.norm == "none"), line.mode
        found.append(row)
        if line.status != MEASURED or line.us is None:
            row["ms"] = row["apart"] = "cannot"
            continue
        if line.variant == TORCH.name and line.norm != "none":
            torchs[line.mode] = line.us
        row["ms"] = milliseconds(line.us)
        row["quartiles"] = f"{milliseconds(line.us_low)}-{milliseconds(line.us_high)}"
        if line.mode in torchs:
            row["of torch"] = f"{line.us / torchs[line.mode]:.3f}"
        kind = "torch.compile" if "torch.compile" in line.variant else TORCH.name
        without = bare.get((kind, line.mode))
        if without is not None and line.norm != "none":
            row["norms"] = f"{1 - without / line.us:.1%}"
        if line.peak_MB is not None:
            row["peak MB"] = f"{line.peak_MB:.0f}"
        row["apart"], row["allowed"] = scientific(line.loss_apart), scientific(line.loss_allowed)
    return found


def milliseconds(us: float | None) -> str:
    return "" if us is None else f"{us / 1e3:.4g}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def show(lines: Sequence[Record], headers: Sequence[str]) -> None:
    """A table for each batch size, with these of TIMES, and why what is not in it is not."""
    for shape in dict.fromkeys(line.shape for line in lines):
        of_shape = [line for line in lines if line.shape == shape]
        first = of_shape[0]
        print(f"\n{first.network}, {shape}, {first.dtype}, {first.layout}")
        print(report.table(headers, [[row[name] for name in headers] for row in rows(of_shape)]), flush=True)
        for mode in MODES:
            for reason in dict.fromkeys(line.note for line in of_shape if line.mode == mode and line.note):
                names = [line.variant for line in of_shape if line.mode == mode and line.note == reason]
                report.paragraph(f"Cannot ({mode}): {', '.join(dict.fromkeys(names))}: {reason}")


def disagreeing(lines: Sequence[Record]) -> list[str]:
    """Whose losses are not within what is allowed; a NaN is not."""
    found = []
    for line in lines:
        apart, allowed = line.loss_apart, line.loss_allowed
        if apart is not None and allowed is not None and not apart <= allowed:
            where = f"{line.variant} ({line.mode}, {line.shape})"
            found.append(f"{where}: losses {apart:.1e} apart, {allowed:.1e} allowed")
    return found


def judge(session: Session, lines: Sequence[Record]) -> None:
    measured = sum(line.status == MEASURED for line in lines)
    if not any(line.loss_apart is not None for line in lines if line.variant != TORCH.name):
        session.note(
            PART, "NOT RUN", f"{measured} of {len(lines)} measured, and no losses of bnfast's to compare"
        )
        return
    faults = disagreeing(lines)
    size = "" if session.gpu else " (a tiny network; step times need a GPU)"
    good = f"{measured} of {len(lines)} measured, all losses agree{size}"
    session.note(PART, "FAIL" if faults else "PASS", "; ".join(faults) or good)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Each record is on the disk as soon as it is there; Ctrl-C shows what was measured until then."""
    session = begin(options, lacking, "bnfast: a training step of ResNet-50")
    task, batches, stages, effort = plan(session, options.batch)
    report.section("A training step", ABOUT if session.gpu else ON_A_CPU)
    report.paragraph(ABOUT_LOSSES)
    lines: list[Record] = []
    total = model_step.ticks(batches, stages, effort)
    with report.progress(total, "training steps") as bar, threads(session):
        found = model_step.measure_steps(
            task, batches, options.budget, stages, effort, tick=partial(bar.update, 1)
        )
        try:
            for line in found:
                records.append(session.folder / "step.csv", [line])
                lines.append(line)
        except KeyboardInterrupt:
            report.paragraph("Stopped: what follows is what was measured until then.")
    show(lines, TIMES if session.gpu else LOSSES)
    judge(session, lines)
    return session.close()
