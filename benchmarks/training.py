"""The job `digits`: the same network trained with torch.nn's layer and with bnfast's; then, where there is no
GPU, its first steps with the kernels themselves. The first look begins with both for BatchNorm."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
from functools import partial

from benchmarks import agreement, digits, kernels_in_training, normalizers, plots, report
from benchmarks.session import Session, begin
from codegen.cases import NAMES


def one_more(bar: report.Bar, loss: float) -> None:
    bar.update(1)


def train_twice(session: Session, layer: str, epochs: int, seed: int) -> None:
    """Part one: the whole training, in fp32 as one does and in fp64, where rounding hides nothing."""
    part, why_torch = "training", session.why_plain_torch()
    report.section("1. Training a residual network on the digits, twice")
    if session.cannot(part, "sklearn"):
        return
    data = digits.load(seed, session.device)
    recipe = digits.Recipe(epochs=epochs, seed=seed)
    steps = len(digits.batches(len(data.train_images), recipe))
    pair = normalizers.pair(layer, steps)
    report.paragraph(
        f"The same small network, seed and batches, once with {pair.their_name} and once with "
        f"{pair.our_name}. In fp32 two correct implementations drift apart by rounding alone, so only "
        f"the first {agreement.BEGINNING} steps are held to a close limit there; in fp64 the whole run is. "
        + pair.about
    )
    curves, rows, faults = {}, [], []
    for dtype, limits in agreement.FULL.items():
        name, runs = NAMES[dtype], []
        for label, norm in ((pair.library, pair.theirs), ("bnfast", pair.ours)):
            with report.progress(steps, f"{name}, {label}") as bar:
                run = digits.train(
                    norm, data, dataclasses.replace(recipe, dtype=dtype), partial(one_more, bar)
                )
            runs.append(run)
        theirs, ours = runs
        apart = agreement.compare(theirs, ours)
        curves[name] = (theirs.losses, ours.losses)
        faults += [f"{name}: {fault}" for fault in apart.beyond(limits)]
        rows.append(
            [
                name, f"{apart.beginning:.1e}", f"{apart.losses:.1e}", f"{apart.parameters:.1e}",
                optional(apart.buffers), f"{theirs.accuracy:.2%}", f"{ours.accuracy:.2%}",
            ]
        )  # fmt: skip
    show_losses(*curves["fp32"], pair.library)
    held = len(data.test_images)
    report.paragraph(f"Largest differences, and the share of {held} held-back images that each gets right:")
    early = f"loss, first {agreement.BEGINNING}"
    print(report.table(["", early, "loss, all", "parameters", "buffers", pair.library, "bnfast"], rows))
    if why_torch and all(theirs == ours for theirs, ours in curves.values()):
        report.paragraph(
            "No difference at any step, and none to expect: without the kernels, which part 2 runs, this "
            "layer calls torch's own function."
        )
    lines = [[name, *line] for name, both in curves.items() for line in step_by_step(*both)]
    columns = ("dtype", "step", "torch_loss", "bnfast_loss", "difference")
    report.write_csv(session.folder / "digits-losses.csv", columns, lines)
    labels = (pair.their_name, pair.our_name)
    session.draw(lambda: plots.losses(session.folder / "digits-losses.png", curves, labels))
    good = f"bnfast's {layer} trains as {pair.library}'s does, within the stated limits"
    session.note(part, "FAIL" if faults else "PASS", "; ".join(faults) or good)


def optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def step_by_step(theirs: list[float], ours: list[float]) -> list[list[float]]:
    """Step, both losses and their difference."""
    return [[step, a, b, b - a] for step, (a, b) in enumerate(zip(theirs, ours, strict=True), 1)]


def show_losses(theirs: list[float], ours: list[float], library: str, lines: int = 10) -> None:
    """A few steps of both curves, the first and the last among them."""
    every = step_by_step(theirs, ours)
    shown = sorted({round(i * (len(every) - 1) / (lines - 1)) for i in range(lines)})
    rows = [
        [f"{step}", f"{a:.6f}", f"{b:.6f}", f"{apart:+.1e}"]
        for step, a, b, apart in (every[i] for i in shown)
    ]
    print(report.table(["step", library, "bnfast", "difference"], rows), "\n")


def kernels(session: Session, layer: str) -> None:
    """Part two: where part one ran on plain torch, a few steps of it with the kernels, in the interpreter."""
    part = "kernels"
    why = session.why_plain_torch()
    if why is None:
        report.section("2. The kernels themselves")
        state = next((state for name, state, _ in session.summary if name == "training"), "NOT RUN")
        session.note(part, state, "see the training above: it uses them, on the GPU")
        return
    report.section(
        "2. The first steps again, with the kernels themselves",
        f"Above, bnfast's layers ran plain torch: {why}. Here the kernels run, in Triton's interpreter, on "
        "small batches of the same images in fp32.",
    )
    if session.cannot(part, "sklearn", "triton"):
        return
    try:
        found = kernels_in_training.check(layer)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        session.note(part, "FAIL", f"the process with the interpreter did not finish: {error}")
        return
    library = normalizers.pair(layer, found.steps).library
    show_losses(found.torch_losses, found.kernel_losses, library)
    columns = ("step", "torch_loss", "kernel_loss", "difference")
    lines = step_by_step(found.torch_losses, found.kernel_losses)
    report.write_csv(session.folder / "kernels-losses.csv", columns, lines)
    limits, apart = agreement.FEW_STEPS, found.apart
    print(
        report.table(
            ["largest difference in", "found", "allowed"],
            [
                ["losses", f"{apart.losses:.1e}", f"{limits.losses:.0e}"],
                ["gradients, first step (relative)", f"{apart.gradients:.1e}", f"{limits.gradients:.0e}"],
                ["parameters, after the last step", f"{apart.parameters:.1e}", f"{limits.parameters:.0e}"],
                ["buffers, after the last step", optional(apart.buffers), f"{limits.buffers:.0e}"],
            ],
        )
    )
    faults = found.faults()
    text = f"{found.launches} launches in {found.steps} steps of {found.batch} images agree with {library}"
    session.note(part, "FAIL" if faults else "PASS", "; ".join(faults) or text)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Both parts, for one of LAYERS."""
    session = begin(options, lacking, f"bnfast: does its {options.layer} train like torch's?")
    train_twice(session, options.layer, options.epochs, options.seed)
    kernels(session, options.layer)
    return session.close()
