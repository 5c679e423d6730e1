"""The first steps of the digits with the kernels themselves, on a machine without a GPU.

Triton's interpreter runs a kernel's programs one by one in numpy: slow, but it is the kernels' own code, on
real activations. It must be asked for before Triton is imported, so `check` starts this module as a process
of its own, which trains torch.nn and bnfast on the same small batches and sends back what it found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks import LAYERS, agreement, digits, normalizers, report

TIME_LIMIT = 240  # seconds


@dataclass(frozen=True)
class Outcome:
    """Both loss curves, how far the runs lie apart, and how many kernels were launched."""

    steps: int
    batch: int
    torch_losses: list[float]
    kernel_losses: list[float]
    apart: agreement.Agreement
    launches: int
    expected_launches: int

    def faults(self) -> list[str]:
        """Empty if the kernels ran, each as often as planned, and agree."""
        found = self.apart.beyond(agreement.FEW_STEPS)
        if self.launches != self.expected_launches:
            found.append(f"{self.launches} kernels were launched and not {self.expected_launches}")
        return found


@contextmanager
def counted_launches() -> Iterator[list[int]]:
    """Counts kernels as they are interpreted, lest a comparison of torch with torch pass for one."""
    from triton.runtime.interpreter import GridExecutor

    count, original = [0], GridExecutor.__call__

    def counting(self: GridExecutor, *args: object, **kwargs: object) -> object:
        count[0] += 1
        return original(self, *args, **kwargs)

    GridExecutor.__call__ = counting
    try:
        yield count
    finally:
        GridExecutor.__call__ = original


def launches_of(pair: normalizers.Pair, images: Tensor, width: int, steps: int) -> int:
    """What the kernels' plan says of so many training steps on batches of this shape, and one in eval."""
    shapes: list[torch.Size] = []

    def noting(channels: int) -> nn.Module:
        norm = pair.theirs(channels)
        norm.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
        return norm

    digits.Network(noting, width)(images)
    planned = [pair.launches(shape) for shape in shapes]
    return sum(steps * (each.forward + each.backward) + each.inference for each in planned)


def first_steps(layer: str, steps: int, batch: int, width: int) -> Outcome:
    """Both runs, in this process, which must have been started with TRITON_INTERPRET=1."""
    from bnfast.interpreted import without_repetition

    pair = normalizers.pair(layer, steps)
    recipe = digits.Recipe(epochs=1, batch=batch, width=width, steps=steps)
    data = digits.load(recipe.seed, torch.device("cpu"))
    few = {"test_images": data.test_images[:batch], "test_labels": data.test_labels[:batch]}
    data = dataclasses.replace(data, **few)
    theirs = digits.train(pair.theirs, data, recipe, lambda loss: None)
    with (
        without_repetition(),
        counted_launches() as launches,
        report.progress(steps, "steps in the interpreter") as bar,
    ):
        ours = digits.train(pair.ours, data, recipe, lambda loss: bar.update(1))
    expected = launches_of(pair, data.test_images, width, steps)
    apart = agreement.compare(theirs, ours)
    return Outcome(steps, batch, theirs.losses, ours.losses, apart, launches[0], expected)


def check(layer: str, steps: int = 3, batch: int = 8, width: int = 8) -> Outcome:
    """`first_steps` in a process with Triton's interpreter on."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "outcome.json")
        command = [sys.executable, "-m", "benchmarks.kernels_in_training", str(out), f"--layer={layer}"]
        command += [f"--steps={steps}", f"--batch={batch}", f"--width={width}"]
        subprocess.run(
            command, check=True, timeout=TIME_LIMIT, env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
        found = json.loads(out.read_text(encoding="utf-8"))
    return Outcome(**{**found, "apart": agreement.Agreement(**found["apart"])})


def main() -> None:
    parser = argparse.ArgumentParser(description="Started by benchmarks.training, in Triton's interpreter.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", choices=LAYERS, required=True)
    for name in ("steps", "batch", "width"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()
    outcome = first_steps(asked.layer, asked.steps, asked.batch, asked.width)
    asked.out.write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")


if __name__ == "__main__":
    main()
