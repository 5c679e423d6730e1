"""python -m bnfast check: the kernels against fp64 on this machine, judged beside torch's own error."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import batch_norm

EPS = 1e-5
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SMALL = ((8, 24, 7, 7), (4, 3, 14, 14), (2, 5, 70, 70), (33, 65, 1, 1), (1, 96, 6, 6))
_RESNET = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    training: bool
    mean: float

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        mode = "train" if self.training else "eval"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{size:18} {self.layout:13} {dtype:8} {mode:5} mean {self.mean:g}"


def cases(device: torch.device) -> list[Case]:
    """Small and awkward shapes first, then, on a GPU, ResNet-50's."""
    shapes = _SMALL if device.type == "cpu" else _SMALL + _RESNET
    grid = itertools.product(shapes, _FORMATS, _DTYPES, (True, False))
    plain = [Case(shape, layout, dtype, training, 0.5) for shape, layout, dtype, training in grid]
    return plain + [Case((8, 24, 7, 7), layout, torch.float32, True, 1e4) for layout in _FORMATS]


def results(case: Case, device: torch.device, function: object, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one step, computed by `function` in `dtype`, as fp64."""
    generator = torch.Generator().manual_seed(7)
    channels = case.shape[1]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # rounded to the case's dtype first: all contestants get the same numbers
    x = (random(*case.shape) + case.mean).to(case.dtype).to(dtype).to(device)
    x = x.contiguous(memory_format=_FORMATS[case.layout]).requires_grad_()
    dy = random(*case.shape).to(case.dtype).to(dtype).to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, variance = (
        t.to(torch.float32).to(wide).to(device)
        for t in (
            random(channels),
            random(channels),
            random(channels) + case.mean,
            random(channels).square() + 0.5,
        )
    )
    weight.requires_grad_()
    bias.requires_grad_()
    y = function(x, mean, variance, weight, bias, case.training, 0.1, EPS)  # type: ignore[operator]
    y.backward(dy)
    spread = x.detach().transpose(0, 1).flatten(1).var(1, correction=0) if case.training else variance
    scale = weight.detach() * torch.rsqrt(spread + EPS)
    ady = dy * scale.view(1, -1, *[1] * (dy.dim() - 2))
    named = {
        "ady": ady,
        "y": y,
        "dx": x.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
        "mean": mean,
        "var": variance,
    }
    return {k: v.detach().double().cpu() for k, v in named.items() if v is not None}


def error(value: Tensor, exact: Tensor) -> float:
    """Relative RMS error; inf where anything is not finite."""
    if not torch.isfinite(value).all():
        return float("inf")
    return ((value - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@dataclass(frozen=True)
class Verdict:
    """Errors of one result against fp64, relative RMS."""

    ours: float
    torch: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.limit  # False for NaN


def judge(case: Case, device: torch.device) -> dict[str, Verdict]:
    """At most twice torch's own error at the same dtype, plus a few units in the last place (more in fp64,
    where the oracle errs as well). Never scaled by the size of the reduction."""
    exact = results(case, device, F.batch_norm, torch.float64)
    ours = results(case, device, batch_norm, case.dtype)
    theirs = results(case, device, F.batch_norm, case.dtype)
    floor = (64 if case.dtype == torch.float64 else 4) * torch.finfo(case.dtype).eps
    verdicts = {}
    for name, value in exact.items():
        other = error(theirs[name], value)
        # dx is what is left of a * dy after two projections: nearly nothing where a channel has two values
        left = (exact["ady"].norm() / value.norm().clamp_min(1e-300)).item() if name == "dx" else 1.0
        verdicts[name] = Verdict(error(ours[name], value), other, 2 * other + floor * max(1.0, left))
    return verdicts


def run(seconds: float) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU, in Triton's interpreter"
    print(f"Checking the kernels on {where}: error against fp64, and torch's own beside it.\n")
    started, failed, todo = time.monotonic(), 0, cases(device)
    done = 0
    for case in todo:
        if time.monotonic() - started > seconds:
            break
        verdicts = judge(case, device)
        bad = [k for k, v in verdicts.items() if not v.ok]
        worst = max(verdicts, key=lambda k: verdicts[k].ours)
        mine, other = verdicts[worst].ours, verdicts[worst].torch
        outcome = "FAIL " + ",".join(bad) if bad else "ok"
        print(f"{outcome:4} {case}   worst {worst:7} {mine:.1e} (torch {other:.1e})")
        failed += bool(bad)
        done += 1
    left = f", {len(todo) - done} not started for lack of time" if done < len(todo) else ""
    print(f"\n{done - failed} passed, {failed} failed{left}, {time.monotonic() - started:.0f} s")
    return 1 if failed or not done else 0
