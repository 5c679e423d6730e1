"""Who is timed: bnfast, and everybody who computes the same, of the same numbers in tensors of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bnfast
from benchmarks.timing import nothing
from bnfast.activation import Activation
from codegen.cases import Case

EPS, MOMENTUM = 1e-5, 0.1
Forward = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Provider:
    """forward(x, z) -> y: act(norm(x) + z) in training, with running statistics updated where torch.nn would;
    z is None without a residual. autograd gives its backward, to x, z and `parameters`. ran: who computes, as
    far as can be said without running it. countable: whether its copies can be counted: torch.compile does
    not run under a dispatch mode."""

    ran: str
    forward: Forward
    parameters: Sequence[Tensor]
    countable: bool = True


def anything(case: Case, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Baseline:
    """A way to compute cases. about: one line for the reader of a table. unable(case, device): why it cannot
    take this one here; None if it can. build: makes it for a case; it may compile for seconds. afresh: runs
    before anybody is built for a case."""

    name: str
    about: str
    unable: Callable[[Case, torch.device], str | None]
    build: Callable[[Case, torch.device], Provider]
    afresh: Callable[[], object] = nothing


@dataclass(frozen=True)
class Given:
    """Parameters and running statistics of a case, all [C]; weight and bias need gradients. Running
    statistics only for BatchNorm, None for the others."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]


def given(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Given:
    """dtype: of the parameters, if not the case's own."""
    generator = torch.Generator().manual_seed(7)

    def random(low: float, high: float, kind: torch.dtype) -> Tensor:
        return torch.empty(case.shape[1]).uniform_(low, high, generator=generator).to(device, kind)

    kind = dtype or case.parameter_dtype
    weight, bias = random(0.5, 1.5, kind).requires_grad_(), random(-0.5, 0.5, kind).requires_grad_()
    mean, variance = random(-0.5, 0.5, torch.float32), random(0.5, 1.5, torch.float32)
    running = case.norm == "BatchNorm"
    return Given(weight, bias, mean if running else None, variance if running else None)


def lacks(module: str) -> str | None:
    """Why a baseline cannot have its package; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as e:  # a package built for another torch fails in many ways
        return f"{module} cannot be imported here: {type(e).__name__}"
    return None


def after(act: Activation | None, y: Tensor, z: Tensor | None) -> Tensor:
    y = y if z is None else y + z
    return y if act is None else act.apply(y)


def normalization(case: Case, g: Given, library: Any, **fused: Any) -> Callable[..., Tensor]:
    """norm(x), by torch.nn.functional or by bnfast.functional, which takes more: `fused`, and a residual."""
    running = (g.running_mean, g.running_var, g.weight, g.bias, True, MOMENTUM, EPS)
    if case.norm == "BatchNorm":
        return lambda x, **z: library.batch_norm(x, *running, **fused, **z)
    if case.norm == "GroupNorm":
        return lambda x, **z: library.group_norm(x, case.groups, g.weight, g.bias, EPS, **fused, **z)
    return lambda x, **z: library.instance_norm(x, *running, **fused, **z)


def composed(case: Case, g: Given) -> Forward:
    """norm, add and activation, one after another."""
    norm, act = normalization(case, g, F), Activation.of(case.activation)
    return lambda x, z: after(act, norm(x), z)


def backend(case: Case, device: torch.device) -> str:
    """Who computes torch's own layer: "Cudnn", "Miopen" or "Native" (ATen)."""
    if case.norm == "GroupNorm":
        return "Native"
    g, x = given(case, device), case.empty(device)
    vectors = [g.weight, g.bias, g.running_mean, g.running_var]
    if case.norm == "InstanceNorm":
        # torch runs it as a batch norm of one sample, with a channel for each sample's channel; whether it
        # has running statistics does not matter in training, and here they cannot be left out
        n, c, *size = case.shape
        vectors = [v.detach().repeat(n) for v in (g.weight, g.bias, g.bias, g.weight)]
        x = torch.empty((1, n * c, *size), dtype=case.dtype, device=device)
    return str(torch._C._select_batch_norm_backend(x, *vectors, True, EPS)).rpartition(".")[2]


# builders, and who cannot take a case


def fused(case: Case, device: torch.device) -> Provider:
    g = given(case, device)
    norm = normalization(case, g, bnfast.functional, activation=case.activation)
    why = bnfast.dispatch.reason_for_torch(torch.empty(2, 8, 2, 2, device=device))
    ran = "Triton" if why is None else "plain torch"
    return Provider(ran, lambda x, z: norm(x, residual=z), g.parameters)


def torchs(case: Case, device: torch.device) -> Provider:
    g = given(case, device)
    return Provider(backend(case, device), composed(case, g), g.parameters)


def without_cudnn(case: Case, device: torch.device) -> Provider:
    """The backward is of the forward's kind: torch keeps the choice with what it saves."""
    g = given(case, device)
    native = torch.backends.cudnn.flags(enabled=False)(composed(case, g))
    return Provider("Native", native, g.parameters)


def with_cudnn(case: Case, device: torch.device) -> Provider:
    """cuDNN's BatchNorm asked for by name, where torch's own choice may be another."""
    g, act = given(case, device), Activation.of(case.activation)
    vectors = (g.weight, g.bias, g.running_mean, g.running_var)

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        return after(act, torch.ops.aten.cudnn_batch_norm(x, *vectors, True, MOMENTUM, EPS)[0], z)

    return Provider(f"cuDNN {torch.backends.cudnn.version()}", forward, g.parameters)


def compiled(mode: str, case: Case, device: torch.device) -> Provider:
    g = given(case, device)
    forward = torch.compile(composed(case, g), dynamic=False, fullgraph=True, mode=mode)
    return Provider(f"inductor, {mode}", forward, g.parameters, countable=False)


def forget() -> None:
    """Of other cases: all are the same code to torch.compile, which gives up after a few versions of it, and
    looks through all of them at each call."""
    torch.compiler.reset()


def same_as_torch(case: Case, device: torch.device) -> str | None:
    if device.type == "cuda" and backend(case, device) == "Native":
        return "torch's own choice is ATen already for this case"
    return None


def no_cudnn(case: Case, device: torch.device) -> str | None:
    if case.norm != "BatchNorm":
        return f"cuDNN's operator in torch is BatchNorm's, not {case.norm}'s"
    available = device.type == "cuda" and torch.backends.cudnn.is_available()
    return None if available else "needs a GPU with cuDNN"


MAX_AUTOTUNE = "max-autotune-no-cudagraphs"  # graphs are made here, the same for everybody
ALL = (
    Baseline("bnfast", "one call with activation= and residual=", anything, fused),
    Baseline("torch", "torch.nn.functional, then + and the activation", anything, torchs),
    Baseline("native", "the same with cuDNN switched off: ATen's kernels", same_as_torch, without_cudnn),
    Baseline("cudnn-op", "aten's cudnn_batch_norm, then + and the activation", no_cudnn, with_cudnn),
    Baseline("compile", "torch.compile of the expression", anything, partial(compiled, "default"), forget),
    Baseline("compile-max", "the same, autotuned", anything, partial(compiled, MAX_AUTOTUNE), forget),
)  # fmt: skip
