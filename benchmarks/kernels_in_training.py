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
from torch import nn

from benchmarks import agreement, digits, report

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


def first_steps(steps: int, batch: int, width: int) -> Outcome:
    """Both runs, in this process, which must have been started with TRITON_INTERPRET=1."""
    import bnfast
    from bnfast.kernels import plan

    recipe = digits.Recipe(epochs=1, batch=batch, width=width, steps=steps)
    data = digits.load(recipe.seed, torch.device("cpu"))
    few = {"test_images": data.test_images[:batch], "test_labels": data.test_labels[:batch]}
    data = dataclasses.replace(data, **few)
    theirs = digits.train(nn.BatchNorm2d, data, recipe, lambda loss: None)
    with counted_launches() as launches, report.progress(steps, "steps in the interpreter") as bar:
        ours = digits.train(bnfast.BatchNorm2d, data, recipe, lambda loss: bar.update(1))
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in digits.Network(nn.BatchNorm2d, width).modules())
    planned = plan.batch_norm(batch, width, 64, 4, False)
    a_step = planned.forward_launches + planned.backward_launches
    expected = layers * (steps * a_step + 1)  # and one launch a layer for the test images, in eval
    apart = agreement.compare(theirs, ours)
    return Outcome(steps, batch, theirs.losses, ours.losses, apart, launches[0], expected)


def check(steps: int = 3, batch: int = 8, width: int = 8) -> Outcome:
    """`first_steps` in a process with Triton's interpreter on."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "outcome.json")
        command = [sys.executable, "-m", "benchmarks.kernels_in_training", str(out)]
        command += [f"--steps={steps}", f"--batch={batch}", f"--width={width}"]
        subprocess.run(
            command, check=True, timeout=TIME_LIMIT, env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
        found = json.loads(out.read_text(encoding="utf-8"))
    return Outcome(**{**found, "apart": agreement.Agreement(**found["apart"])})


def main() -> None:
    parser = argparse.ArgumentParser(description="Started by benchmarks.first_look, in Triton's interpreter.")
    parser.add_argument("out", type=Path)
    for name in ("steps", "batch", "width"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()
    outcome = first_steps(asked.steps, asked.batch, asked.width)
    asked.out.write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")


if __name__ == "__main__":
    main()
