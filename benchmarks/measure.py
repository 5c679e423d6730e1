"""GPU time of a layer's forward and backward: without help from the cache, and without the host's own time.

Inputs rotate, so that a call finds nothing of its own in L2. A whole rotation lies between two events and is
queued while the GPU is kept busy, so that it never waits for a launch. The figure is a median over rotations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

COLD_BYTES = 256 * 2**20  # between two uses of a buffer: four times the L2 of an H200
ROUNDS = 20
HEAD_START = 10_000_000  # GPU cycles, about 5 ms: longer than the host takes to queue a rotation

Stopwatch = Callable[[Callable[[], None]], float]  # runs what it is given, returns microseconds


@dataclass(frozen=True)
class Times:
    """Median microseconds of one call, and who computed."""

    forward: float
    backward: float
    backend: str


def gpu_stopwatch(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def rotation(size: int) -> int:
    """How many buffers of `size` bytes it takes until the first is cold again."""
    return max(2, -(-COLD_BYTES // size) + 1)


def median_per_call(
    calls: Sequence[Callable[[], object]], prepare: Callable[[], None], stopwatch: Stopwatch, rounds: int
) -> float:
    """Microseconds of one of `calls`, which are timed together; `prepare` runs before each round, untimed."""

    def all_of_them() -> None:
        for call in calls:
            call()

    found = []
    for number in range(rounds + 2):  # two to warm up
        prepare()
        elapsed = stopwatch(all_of_them)
        if number >= 2:
            found.append(elapsed / len(calls))
    return statistics.median(found)


def layer(
    norm: nn.Module,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    stopwatch: Stopwatch = gpu_stopwatch,
    rounds: int = ROUNDS,
) -> tuple[float, float]:
    """One call in training: forward (with what autograd does in it), backward (to input, weight and bias)."""
    outputs: list[Tensor] = []
    parameters = list(norm.parameters())

    def forward(number: int) -> None:
        outputs.append(norm(inputs[number]))

    def run_forward() -> None:
        outputs.clear()
        for number in range(len(inputs)):
            forward(number)

    def backward(number: int) -> None:
        torch.autograd.grad(outputs[number], [inputs[number], *parameters], gradients[number])

    forwards = [partial(forward, number) for number in range(len(inputs))]
    backwards = [partial(backward, number) for number in range(len(inputs))]
    return (
        median_per_call(forwards, outputs.clear, stopwatch, rounds),
        median_per_call(backwards, run_forward, stopwatch, rounds),
    )


def backend(norm: nn.BatchNorm2d, x: Tensor) -> str:
    """Who computes torch's own layer: "Cudnn", "Miopen" or "Native" (ATen)."""
    arguments = (norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.eps)
    return str(torch._C._select_batch_norm_backend(x, *arguments)).rpartition(".")[2]


def compare(shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool) -> tuple[Times, Times]:
    """bnfast's and torch's time for one shape on the GPU: same tensors, same fp32 parameters."""
    import bnfast

    layout = torch.channels_last if channels_last else torch.contiguous_format
    count = rotation(torch.Size(shape).numel() * dtype.itemsize)

    def randoms() -> list[Tensor]:
        new = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(count)]
        return [x.contiguous(memory_format=layout) for x in new]

    inputs, gradients = [x.requires_grad_() for x in randoms()], randoms()
    ours, theirs = bnfast.BatchNorm2d(shape[1], device="cuda"), nn.BatchNorm2d(shape[1], device="cuda")
    found = Times(*layer(ours, inputs, gradients), "bnfast")
    return found, Times(*layer(theirs, inputs, gradients), backend(theirs, inputs[0]))
