"""The main job: does bnfast train like torch.nn, do its kernels compute the same, and what do they cost?"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

import bnfast
from benchmarks import agreement, digits, kernels_in_training, measure, plots, report, resnet50
from bnfast import dispatch

BATCH = 256
NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Look:
    """One run: where its files go, what cannot be imported, and the line for each part in the summary."""

    folder: Path
    device: torch.device
    epochs: int
    seed: int
    lacking: list[str]
    summary: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, part: str, state: str, text: str) -> None:
        """`state`: PASS, FAIL, DONE (nothing to judge) or NOT RUN."""
        self.summary.append((part, state, text))
        report.paragraph(f"{state}: {text}")

    def cannot(self, part: str, *needed: str) -> bool:
        """Whether something a part needs is not installed; says so."""
        absent = [name for name in needed if name in self.lacking]
        if absent:
            self.note(part, "NOT RUN", f"this Python lacks {', '.join(absent)}")
        return bool(absent)

    def draw(self, picture: Callable[[], None]) -> None:
        if "matplotlib" not in self.lacking:
            picture()


def machine(look: Look) -> None:
    report.section("This machine")
    gpu = torch.cuda.get_device_name(look.device) if look.device.type == "cuda" else "no GPU in use"
    versions = f"bnfast {bnfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}; {gpu}")
    why = why_plain_torch(look.device)
    ours = f"plain torch: {why}" if why else "the Triton kernels"
    report.paragraph(f"Here bnfast's layers run {ours}.")


def why_plain_torch(device: torch.device) -> str | None:
    return dispatch.reason_for_torch(torch.empty(2, 8, 2, 2, device=device))


def one_more(bar: report.Bar, loss: float) -> None:
    bar.update(1)


def train_twice(look: Look) -> None:
    """Part one: the whole training, in fp32 as one does and in fp64, where rounding hides nothing."""
    part = "training"
    report.section(
        "1. Training a residual network on the digits, twice",
        "The same small network, seed and batches, once with torch.nn.BatchNorm2d and once with "
        "bnfast.BatchNorm2d. In fp32 two correct implementations drift apart by rounding alone, so only "
        f"the first {agreement.BEGINNING} steps are held to a close limit there; in fp64 the whole run is.",
    )
    if look.cannot(part, "sklearn"):
        return
    data = digits.load(look.seed, look.device)
    curves, rows, faults = {}, [], []
    for dtype, limits in agreement.FULL.items():
        recipe = digits.Recipe(epochs=look.epochs, seed=look.seed, dtype=dtype)
        steps = len(digits.batches(len(data.train_images), recipe))
        runs = []
        for label, norm in (("torch.nn", nn.BatchNorm2d), ("bnfast", bnfast.BatchNorm2d)):
            with report.progress(steps, f"{NAMES[dtype]}, {label}") as bar:
                runs.append(digits.train(norm, data, recipe, partial(one_more, bar)))
        theirs, ours = runs
        apart = agreement.compare(theirs, ours)
        curves[NAMES[dtype]] = (theirs.losses, ours.losses)
        faults += [f"{NAMES[dtype]}: {fault}" for fault in apart.beyond(limits)]
        rows.append(
            [
                NAMES[dtype], f"{apart.beginning:.1e}", f"{apart.losses:.1e}", f"{apart.parameters:.1e}",
                f"{apart.buffers:.1e}", f"{theirs.accuracy:.2%}", f"{ours.accuracy:.2%}",
            ]
        )  # fmt: skip
    theirs_curve, ours_curve = curves["fp32"]
    show_losses(theirs_curve, ours_curve)
    held = len(data.test_images)
    report.paragraph(f"Largest differences, and the share of {held} held-back images that each gets right:")
    early = f"loss, first {agreement.BEGINNING}"
    print(report.table(["", early, "loss, all", "parameters", "buffers", "torch.nn", "bnfast"], rows))
    lines = [
        [name, step, a, b, b - a]
        for name, (theirs_losses, ours_losses) in curves.items()
        for step, (a, b) in enumerate(zip(theirs_losses, ours_losses, strict=True), 1)
    ]
    columns = ("dtype", "step", "torch_loss", "bnfast_loss", "difference")
    report.write_csv(look.folder / "digits-losses.csv", columns, lines)
    look.draw(lambda: plots.losses(look.folder / "digits-losses.png", curves))
    if faults:
        look.note(part, "FAIL", "; ".join(faults))
    else:
        look.note(part, "PASS", "bnfast trains as torch.nn does, within the stated limits")


def show_losses(theirs: list[float], ours: list[float], lines: int = 10) -> None:
    """A few steps of both curves, the first and the last among them."""
    shown = sorted({round(i * (len(theirs) - 1) / (lines - 1)) for i in range(lines)})
    pairs = [(i + 1, theirs[i], ours[i]) for i in shown]
    rows = [[str(step), f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}"] for step, a, b in pairs]
    print(report.table(["step", "torch.nn", "bnfast", "difference"], rows), "\n")


def kernels(look: Look) -> None:
    """Part two: where part one ran on plain torch, a few steps of it with the kernels, in the interpreter."""
    part = "kernels"
    why = why_plain_torch(look.device)
    if why is None:
        report.section("2. The kernels themselves")
        state = next((state for name, state, _ in look.summary if name == "training"), "NOT RUN")
        look.note(part, state, "see the training above: it uses them, on the GPU")
        return
    report.section(
        "2. The first steps again, with the kernels themselves",
        f"Above, bnfast's layers ran plain torch: {why}. Here the kernels run, in Triton's interpreter, on "
        "small batches of the same images in fp32.",
    )
    if look.cannot(part, "sklearn", "triton"):
        return
    try:
        found = kernels_in_training.check()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        look.note(part, "FAIL", f"the process with the interpreter did not finish: {error}")
        return
    show_losses(found.torch_losses, found.kernel_losses)
    losses = zip(found.torch_losses, found.kernel_losses, strict=True)
    rows = [[step, a, b, b - a] for step, (a, b) in enumerate(losses, 1)]
    columns = ("step", "torch_loss", "kernel_loss", "difference")
    report.write_csv(look.folder / "kernels-losses.csv", columns, rows)
    limits, apart = agreement.FEW_STEPS, found.apart
    print(
        report.table(
            ["largest difference in", "found", "allowed"],
            [
                ["losses", f"{apart.losses:.1e}", f"{limits.losses:.0e}"],
                ["gradients, first step (relative)", f"{apart.gradients:.1e}", f"{limits.gradients:.0e}"],
                ["parameters, after the last step", f"{apart.parameters:.1e}", f"{limits.parameters:.0e}"],
                ["buffers, after the last step", f"{apart.buffers:.1e}", f"{limits.buffers:.0e}"],
            ],
        )
    )
    faults = found.faults()
    text = f"{found.launches} launches in {found.steps} steps of {found.batch} images agree with torch.nn"
    look.note(part, "FAIL" if faults else "PASS", "; ".join(faults) or text)


def resnet(look: Look) -> None:
    """Part three: what each BatchNorm of ResNet-50 moves and launches and, on a GPU, takes."""
    gpu = look.device.type == "cuda"
    report.section(
        f"3. ResNet-50's {len(resnet50.layers())} BatchNorm layers: batch {BATCH}, 16-bit, channels_last",
        "T is the size of a layer's input. Bytes moved and kernels launched (runs) are counted, from the "
        "kernels' plan; a/b is forward/backward. The floor is the time those bytes take at "
        f"{resnet50.COPY_RATE / 1e12:.1f} TB/s, an assumption (the copy rate of an H200), not a measurement.",
    )
    # Most train in bf16, which torch computes in ATen; of the 16-bit types it gives only fp16 to cuDNN.
    kept: list[list[object]] = []
    measured, absent = 0, "-" if gpu else report.NEEDS_GPU
    for dtype in (torch.bfloat16, torch.float16) if gpu else (torch.bfloat16,):
        sms = torch.cuda.get_device_properties(look.device).multi_processor_count if gpu else 132
        rows = resnet50.rows(BATCH, dtype.itemsize, channels_last=True, sms=sms)
        if gpu:
            print(f"\n{NAMES[dtype]}, with fp32 parameters")
            rows = timed(rows, dtype)
            measured += sum(row.bnfast is not None for row in rows)
        lines = [resnet50.cells(row, absent) for row in rows]
        print(report.table(resnet50.HEADERS, [*lines, resnet50.total(rows, absent)]))
        if gpu:
            report.paragraph("GB/s, of the bytes counted above in both cases:")
            print(report.table(resnet50.SPEED_HEADERS, [resnet50.speed(row) for row in rows]))
        kept += [resnet50.csv_row(row, BATCH, NAMES[dtype], "channels_last", absent) for row in rows]
        title = f"ResNet-50, batch {BATCH}, {NAMES[dtype]}, channels_last"
        look.draw(partial(plots.resnet, look.folder / f"resnet50-{NAMES[dtype]}.png", rows, title))
    report.write_csv(look.folder / "resnet50.csv", resnet50.CSV_HEADERS, kept)
    times = f"{measured} of {len(kept)} shapes measured" if gpu else "measured times need a GPU"
    look.note("resnet-50", "DONE", f"counted; {times}")


def timed(rows: list[resnet50.Row], dtype: torch.dtype) -> list[resnet50.Row]:
    """The rows with times in them. A shape that does not fit in the GPU's memory stays without."""
    found = []
    with report.progress(len(rows), f"timing {NAMES[dtype]}") as bar:
        for row in rows:
            shape = (BATCH, row.shape.channels, row.shape.side, row.shape.side)
            try:
                ours, theirs = measure.compare(shape, dtype, channels_last=True)
                row = dataclasses.replace(row, bnfast=ours, torch=theirs)
            except torch.OutOfMemoryError:
                report.paragraph(f"{row.shape}: not measured, out of memory")
            torch.cuda.empty_cache()
            found.append(row)
            bar.update(1)
    return found


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """All parts. Returns 1 if anything disagreed, else 0; a part that could not run is only named."""
    start = time.monotonic()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    look = Look(report.new_folder(options.out), device, options.epochs, options.seed, lacking)
    print("bnfast, a first look: does it train like torch.nn, do its kernels agree, what do they move?")
    for part in (machine, train_twice, kernels, resnet):
        part(look)
    report.section("Summary")
    if "matplotlib" in lacking:
        look.summary.append(("pictures", "NOT RUN", "this Python lacks matplotlib"))
    for name, state, text in look.summary:
        print(f"{state:<8} {name:<10} {text}")
    failed = any(state == "FAIL" for _, state, _ in look.summary)
    print(f"\n{time.monotonic() - start:.0f} s. Tables (CSV) and pictures (PNG) are in {look.folder}")
    return int(failed)
