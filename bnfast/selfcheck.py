"""python -m bnfast check: compares the kernels on this machine with fp64, and their error with torch's
own."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import replace
from typing import Any

import torch

import bnfast

from . import exact
from .checks import one_step
from .checks.cases import Case, batch_renorm, given, group_norm, instance_norm, layer_norm
from .checks.fp64 import judge
from .dispatch import INTERPRET

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
FAR = 1e4  # a mean, in standard deviations
# for Triton's interpreter: small shapes, each irregular in a different way
_SMALL = (
    Case((8, 24, 7, 7)), Case((8, 24, 7, 7), training=False), batch_renorm((8, 24, 7, 7)),
    group_norm((3, 30, 7, 7), groups=3), instance_norm((4, 6, 9, 9)), layer_norm((33, 100)),
    Case((4, 3, 14, 14)), Case((2, 5, 70, 70)), batch_renorm((4, 3, 14, 14), training=False),
    group_norm((2, 4, 70, 70), groups=2), instance_norm((4, 6, 14, 14), tracked=True), layer_norm((5, 1001)),
    Case((33, 65, 1, 1)), batch_renorm((33, 65, 1, 1)),
    group_norm((5, 64, 1, 1), groups=16), layer_norm((3, 9000)),
)  # fmt: skip
# shapes of ResNet-50, of an image model, of a language model
_LARGE = (
    *(Case((32, c, s, s)) for c, s in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))),
    batch_renorm((32, 256, 56, 56)),
    group_norm((2, 320, 64, 64), groups=32),
    group_norm((1, 128, 512, 512), groups=32),
    instance_norm((2, 32, 64, 64, 64)),
    layer_norm((8192, 4096)),
)
_LEGEND = f"""
share  the worst element's error over what it may be: its rounding, and a few units of the type
       that it is computed in
mode   far: a training step on values whose mean is 1e4 times their deviation
rms    root mean square error of the worst channel, and torch's own

     {"layer":12} {"shape":13} layout dtype mode  {"result":12}share   rms torch"""


def cases(device: torch.device) -> list[Case]:
    """Every layer in every dtype and layout: small and irregular shapes first, then, on a GPU, shapes of
    networks. Cases with means far from zero come last."""
    shapes = _SMALL if device.type == "cpu" else _SMALL + _LARGE
    grid = [
        replace(case, dtype=dtype, channels_last=last)
        for case, dtype in itertools.product(shapes, DTYPES)
        for last in ((False, True) if len(case.shape) > 2 else (False,))
    ]
    far = [replace(case, mean=FAR) for case in grid if case.dtype == torch.float32 and case.training]
    return grid + far[: len(far) if device.type == "cuda" else 8]


def _row(outcome: str, case: Case, rest: str) -> str:
    size = "x".join(map(str, case.shape))
    layout = "" if len(case.shape) == 2 else "nhwc" if case.channels_last else "nchw"
    mode = ("far" if case.mean == FAR else "train") if case.training else "eval"
    return f"{outcome:4} {case.layer:12} {size:13} {layout:6} {DTYPES[case.dtype]:5} {mode:5} {rest}"


def _told(name: str, verdict: exact.Verdict) -> str:
    share = min(verdict.share, 9.99)  # the columns have no more room
    return f"{name:12} {share:4.2f} {verdict.rms:.0e} {verdict.torch:.0e}"


def run(seconds: float, compiled: bool = False) -> int:
    """compiled: the kernels' compiled PTX is executed on the CPU, each launch in three schedules."""
    device = torch.device("cuda" if torch.cuda.is_available() and not compiled else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU, in Triton's interpreter"
    way: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    faults: tuple[type[Exception], ...] = ()  # what ends a case, and not the others
    if compiled:
        from .ptx import executing  # needs Triton
        from .ptx.execute import Fault
        from .ptx.program import UnknownInstruction

        faults = Fault, UnknownInstruction
        where, way = "this CPU, which executes their compiled PTX", executing(seeds=(1, 2, 3))
    elif INTERPRET:
        from .interpreted import prepared  # needs numpy

        way = prepared()
    print(f"Checking the kernels on {where}, against fp64: of each case the result closest to its limit.")
    print(_LEGEND)
    started, failed, done, todo = time.monotonic(), 0, 0, cases(device)
    with way as launched:
        for case in todo:
            if time.monotonic() - started > seconds:
                break
            tensors = given(case, device)
            try:
                verdicts = judge(case, tensors, one_step.run(case, bnfast, tensors))
            except faults as fault:
                failed += 1
                print(_row("FAIL", case, f"{fault}".partition("\n")[0]), flush=True)
            else:
                bad = [name for name, verdict in verdicts.items() if not verdict.ok]
                for name in bad or [max(verdicts, key=lambda name: verdicts[name].share)]:
                    told = _told(name, verdicts[name])
                    print(_row("FAIL" if bad else "ok", case, told), flush=True)
                failed += bool(bad)
            done += 1
            if compiled:
                launched.clear()  # and with them the memory of their tensors
    left = f", {len(todo) - done} not started for lack of time" if done < len(todo) else ""
    print(f"\n{done - failed} passed, {failed} failed{left}, {time.monotonic() - started:.0f} s")
    return 1 if failed or not done else 0
