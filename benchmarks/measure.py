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

from benchmarks.suites import Network, Shape

COLD_BYTES = 256 * 2**20  # between two uses of a buffer: four times the L2 of an H200
ROUNDS = 20
HEAD_START = 10_000_000  # GPU cycles, about 5 ms: longer than the host takes to queue a rotation

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

Stopwatch = Callable[[Callable[[], None]], float]  # runs what it is given, returns microseconds
Maker = Callable[[], nn.Module]


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


def backend(norm: nn.Module, x: Tensor) -> str:
    """Who computes torch's own layer: "Cudnn", "Miopen" or "Native" (ATen)."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        vectors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    elif isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        # torch runs it as a batch norm of one sample, with a channel for each sample's channel; whether it
        # has running statistics does not matter in training, and here they cannot be left out
        vectors = [v.repeat(len(x)) for v in (norm.weight, norm.bias, norm.bias, norm.weight)]
        x = x.new_empty((1, len(x) * x.shape[1], *x.shape[2:]))
    else:
        return "Native"
    return str(torch._C._select_batch_norm_backend(x, *vectors, True, norm.eps)).rpartition(".")[2]


def makers(network: Network, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Maker, Maker]:
    """What makes bnfast's layer and torch's, for x of this type: with fp32 parameters, but for GroupNorm, as
    torch's takes none but of x's own type on a GPU."""
    import bnfast

    if network.norm == "GroupNorm":
        name, own = "GroupNorm", dtype
        arguments: tuple[int, ...] = (network.groups_of(shape), shape.channels)
    else:
        name, own = f"{network.norm}{len(shape.size)}d", torch.float32
        arguments = (shape.channels,)
    ours, theirs = (
        partial(getattr(library, name), *arguments, affine=True, device=device, dtype=own)
        for library in (bnfast, nn)
    )
    return ours, theirs


def compare(
    ours: Maker, theirs: Maker, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool,
    device: torch.device, stopwatch: Stopwatch = gpu_stopwatch,
) -> tuple[Times, Times]:  # fmt: skip
    """The times of two layers for one x: same tensors, parameters as they are made."""
    layout = FORMATS[len(shape)] if channels_last else torch.contiguous_format
    count = rotation(torch.Size(shape).numel() * dtype.itemsize)

    def randoms() -> list[Tensor]:
        new = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
        return [x.contiguous(memory_format=layout) for x in new]

    inputs, gradients = [x.requires_grad_() for x in randoms()], randoms()
    found = Times(*layer(ours(), inputs, gradients, stopwatch), "bnfast")
    torchs = theirs()
    return found, Times(*layer(torchs, inputs, gradients, stopwatch), backend(torchs, inputs[0]))
