"""python -m bnfast check: the kernels against fp64 on this machine, judged beside torch's own error."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import exact
from .dispatch import INTERPRET
from .functional import batch_norm

EPS = 1e-5
MOMENTUM = 0.1
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
        return f"{size:13} {self.layout:13} {dtype:8} {mode:5} {self.mean:5g}"


def cases(device: torch.device) -> list[Case]:
    """Small and awkward shapes first, then, on a GPU, ResNet-50's."""
    shapes = _SMALL if device.type == "cpu" else _SMALL + _RESNET
    grid = itertools.product(shapes, _FORMATS, _DTYPES, (True, False))
    plain = [Case(shape, layout, dtype, training, 0.5) for shape, layout, dtype, training in grid]
    return plain + [Case((8, 24, 7, 7), layout, torch.float32, True, 1e4) for layout in _FORMATS]


@dataclass(frozen=True)
class Given:
    """The tensors that a case starts from."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def given(case: Case, device: torch.device) -> Given:
    generator = torch.Generator().manual_seed(7)
    channels, parameters = case.shape[1], exact.accumulator(case.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(t: Tensor) -> Tensor:
        return t.to(case.dtype).to(device).contiguous(memory_format=_FORMATS[case.layout])

    x, dy = placed(random(*case.shape) + case.mean), placed(random(*case.shape))
    vectors = (
        random(channels),
        random(channels),
        random(channels) + case.mean,
        random(channels).square() + 0.5,
    )
    return Given(x, dy, *(v.to(parameters).to(device) for v in vectors))


def results(case: Case, tensors: Given, function: Callable[..., Tensor] = batch_norm) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one step, computed by `function`."""
    leaves = [t.detach().clone().requires_grad_() for t in (tensors.x, tensors.weight, tensors.bias)]
    x, weight, bias = leaves
    mean, variance = tensors.running_mean.clone(), tensors.running_var.clone()
    y = function(x, mean, variance, weight, bias, case.training, MOMENTUM, EPS)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, tensors.dy)
    named = {"y": y.detach(), "dx": dx, "dweight": dweight, "dbias": dbias}
    return {**named, "running_mean": mean, "running_var": variance}


def expectations(case: Case, tensors: Given) -> dict[str, exact.Value]:
    mean, variance = tensors.running_mean, tensors.running_var
    fixed = None if case.training else (mean, variance)
    truth = exact.batch_norm(tensors.x, tensors.dy, tensors.weight, tensors.bias, EPS, fixed)
    running = {"running_mean": mean, "running_var": variance}
    return {
        "y": truth.y(tensors.x),
        "dx": truth.dx(tensors.x, tensors.dy),
        "dweight": truth.dweight(),
        "dbias": truth.dbias(),
        **(
            truth.running(mean, variance, MOMENTUM)
            if case.training
            else {name: (t.double(), t.double().abs()) for name, t in running.items()}
        ),
    }


def judge(case: Case, tensors: Given, ours: dict[str, Tensor]) -> dict[str, exact.Verdict]:
    """What results() gave, beside torch's for the same tensors."""
    theirs = results(case, tensors, F.batch_norm)
    accumulating = exact.accumulator(case.dtype)
    return {
        name: exact.judge(ours[name], theirs[name], expected, accumulating)
        for name, expected in expectations(case, tensors).items()
    }


def check(case: Case, device: torch.device) -> dict[str, exact.Verdict]:
    tensors = given(case, device)
    return judge(case, tensors, results(case, tensors))


def _row(outcome: str, case: Case, name: str, verdict: exact.Verdict) -> str:
    numbers = f"{verdict.share:7.2f} {verdict.rms:8.1e} {verdict.torch:8.1e}"
    return f"{outcome:4} {case}  {name:12} {numbers}"


def run(seconds: float) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU, in Triton's interpreter"
    print(f"Checking the kernels on {where}, against fp64: of each case the result closest to its limit.\n")
    print("share  the worst element's error over what it may be: its rounding, and a few units of the type")
    print("       that it is computed in")
    print("rms    root mean square error of the worst channel, and torch's own\n")
    inputs = f"{'shape':13} {'layout':13} {'dtype':8} mode   mean"
    print(f"{'':5}{inputs}  {'result':12}   share      rms  torch's")
    started, failed, todo = time.monotonic(), 0, cases(device)
    done = 0
    rounding: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if INTERPRET:
        from .interpreted import bfloat16_to_nearest

        rounding = bfloat16_to_nearest()
    with rounding:
        for case in todo:
            if time.monotonic() - started > seconds:
                break
            verdicts = check(case, device)
            bad = [name for name, verdict in verdicts.items() if not verdict.ok]
            for name in bad or [max(verdicts, key=lambda name: verdicts[name].share)]:
                print(_row("FAIL" if bad else "ok", case, name, verdicts[name]), flush=True)
            failed += bool(bad)
            done += 1
    left = f", {len(todo) - done} not started for lack of time" if done < len(todo) else ""
    print(f"\n{done - failed} passed, {failed} failed{left}, {time.monotonic() - started:.0f} s")
    return 1 if failed or not done else 0
