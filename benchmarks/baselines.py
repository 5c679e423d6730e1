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
from bnfast.activation import Activation
from codegen.cases import Case

EPS, MOMENTUM = 1e-5, 0.1
Forward = Callable[[Tensor, Tensor | None], Tensor]
Inputs = tuple[Tensor, Tensor | None, Tensor]  # x, z where there is a residual, and dy


@dataclass(frozen=True)
class Provider:
    """forward(x, z) -> y: act(norm(x) + z) in training, with running statistics updated where torch.nn would;
    z is None without a residual. parameters: weight and bias. ran: who computes, as far as can be said
    without running it."""

    ran: str
    forward: Forward
    parameters: Sequence[Tensor]

    def backward(self, y: Tensor, x: Tensor, z: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x, of z if there is one, and of the parameters, by autograd."""
        return torch.autograd.grad(y, [x, *([] if z is None else [z]), *self.parameters], dy)


@dataclass(frozen=True)
class Baseline:
    """A way to compute cases. about: one line for the reader of a table. build: makes it for a case.
    unable(case, device): why it cannot take this one here; None if it can. compiled: whether torch.compile
    makes it, which takes seconds and does not run under a dispatch mode."""

    name: str
    about: str
    build: Callable[[Case, torch.device], Provider]
    unable: Callable[[Case, torch.device], str | None] = lambda case, device: None
    compiled: bool = False


def inputs(case: Case, device: torch.device, number: int = 0) -> Inputs:
    """For a call of this number: the same for everybody."""
    z = case.tensor(device, 1000 + number).requires_grad_() if case.residual else None
    return case.tensor(device, number).requires_grad_(), z, case.tensor(device, 2000 + number)


def given(
    case: Case, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Any]]:
    """[weight, bias] and [running mean, running variance], all [C]; the latter for BatchNorm alone, and None
    for others. dtype: of the parameters, if not the case's own."""
    generator = torch.Generator().manual_seed(7)

    def random(low: float, high: float, kind: torch.dtype) -> Tensor:
        return torch.empty(case.shape[1]).uniform_(low, high, generator=generator).to(device, kind)

    kind = dtype or case.parameter_dtype
    parameters = [random(low, low + 1, kind).requires_grad_() for low in (0.5, -0.5)]
    running = [random(low, low + 1, torch.float32) for low in (-0.5, 0.5)]
    return parameters, running if case.norm == "BatchNorm" else [None, None]


def lacks(module: str) -> str | None:
    """Why a baseline cannot have its package; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as e:  # a package built for another torch fails in many ways
        return f"{module} cannot be imported here: {type(e).__name__}"
    return None


def followed(case: Case, norm: Callable[..., Tensor]) -> Forward:
    """norm, add and activation, one after another."""
    act = Activation.of(case.activation)

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        y = norm(x) if z is None else norm(x) + z
        return y if act is None else act.apply(y)

    return forward


def normalization(
    case: Case, parameters: list[Tensor], running: list[Any], library: Any, **fused: Any
) -> Callable[..., Tensor]:
    """norm(x), by torch.nn.functional or by bnfast.functional, which takes more: `fused`, and a residual."""
    if case.norm == "GroupNorm":
        return lambda x, **z: library.group_norm(x, case.groups, *parameters, EPS, **fused, **z)
    norm = library.batch_norm if case.norm == "BatchNorm" else library.instance_norm
    return lambda x, **z: norm(x, *running, *parameters, True, MOMENTUM, EPS, **fused, **z)


def backend(case: Case, device: torch.device) -> str:
    """Who computes torch's own layer: "Cudnn", "Miopen" or "Native" (ATen)."""
    if case.norm == "GroupNorm":
        return "Native"
    (parameters, running), x = given(case, device), case.empty(device)
    vectors = [*parameters, *running]
    if case.norm == "InstanceNorm":
        # torch runs it as a batch norm of one sample, with a channel for each sample's channel; whether it
        # has running statistics does not matter in training, and here they cannot be left out
        n, c, *size = case.shape
        vectors = [v.detach().repeat(n) for v in (*parameters, *reversed(parameters))]
        x = torch.empty((1, n * c, *size), dtype=case.dtype, device=device)
    return str(torch._C._select_batch_norm_backend(x, *vectors, True, EPS)).rpartition(".")[2]


# builders, and who cannot take a case


def fused(case: Case, device: torch.device) -> Provider:
    parameters, running = given(case, device)
    norm = normalization(case, parameters, running, bnfast.functional, activation=case.activation)
    why = bnfast.dispatch.reason_for_torch(torch.empty(2, 8, 2, 2, device=device))
    ran = "Triton" if why is None else "plain torch"
    return Provider(ran, lambda x, z: norm(x, residual=z), parameters)


def torchs(
    case: Case, device: torch.device, ran: str = "", wrap: Callable[[Forward], Forward] | None = None
) -> Provider:
    """wrap: what makes something else of it, which is called `ran`."""
    parameters, running = given(case, device)
    forward = followed(case, normalization(case, parameters, running, F))
    return Provider(ran or backend(case, device), wrap(forward) if wrap else forward, parameters)


def with_cudnn(case: Case, device: torch.device) -> Provider:
    """cuDNN's BatchNorm asked for by name, where torch's own choice may be another."""
    parameters, running = given(case, device)

    def norm(x: Tensor) -> Tensor:
        return torch.ops.aten.cudnn_batch_norm(x, *parameters, *running, True, MOMENTUM, EPS)[0]

    return Provider(f"cuDNN {torch.backends.cudnn.version()}", followed(case, norm), parameters)


def same_as_torch(case: Case, device: torch.device) -> str | None:
    if device.type == "cuda" and backend(case, device) == "Native":
        return "torch's own choice is ATen already for this case"
    return None


def no_cudnn(case: Case, device: torch.device) -> str | None:
    if case.norm != "BatchNorm":
        return f"cuDNN is asked for BatchNorm, not for {case.norm}"
    available = device.type == "cuda" and torch.backends.cudnn.is_available()
    return None if available else "needs a GPU with cuDNN"


def compiled(name: str, about: str, mode: str) -> Baseline:
    wrap = partial(torch.compile, dynamic=False, fullgraph=True, mode=mode)
    build = partial(torchs, ran=f"inductor, {mode}", wrap=wrap)
    return Baseline(name, about, build, compiled=True)


# the backward is of the forward's kind: torch keeps the choice with what it saves
NATIVE = partial(torchs, ran="Native", wrap=torch.backends.cudnn.flags(enabled=False))
ALL = (
    Baseline("bnfast", "one call with activation= and residual=", fused),
    Baseline("torch", "torch.nn.functional, then + and the activation", torchs),
    Baseline("native", "the same with cuDNN switched off: ATen's kernels", NATIVE, same_as_torch),
    Baseline("cudnn-op", "aten's cudnn_batch_norm, then + and the activation", with_cudnn, no_cudnn),
    compiled("compile", "torch.compile of the expression", "default"),
    compiled("compile-max", "the same, autotuned", "max-autotune-no-cudagraphs"),  # graphs are made here
)
