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
class Contender:
    """forward(x, z) -> y: act(norm(x) + z) in training, with running statistics updated where torch.nn would;
    z is None without a residual. autograd gives its backward, to x, z and `parameters`. ran: who computes, as
    far as can be said without running it. countable: whether its copies can be counted: torch.compile does
    not run under a dispatch mode."""

    ran: str
    forward: Forward
    parameters: Sequence[Tensor]
    countable: bool = True


@dataclass(frozen=True)
class Baseline:
    """A way to compute cases. unable(case, device): why it cannot take this one here; None if it can. build:
    makes it for a case; it may compile for seconds. about: one line for the reader of a table. afresh: runs
    before anybody is built for a case."""

    name: str
    about: str
    unable: Callable[[Case, torch.device], str | None]
    build: Callable[[Case, torch.device], Contender]
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

    kind = case.parameter_dtype if dtype is None else dtype
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


# bnfast, and PyTorch's own: its layers as users write them, without cuDNN, with cuDNN, and compiled


def anything(case: Case, device: torch.device) -> str | None:
    return None


def normalization(case: Case, g: Given, library: Any, **fused: Any) -> Callable[..., Tensor]:
    """norm(x), by torch.nn.functional or by bnfast.functional, which takes more: `fused`, and a residual."""
    running = (g.running_mean, g.running_var, g.weight, g.bias, True, MOMENTUM, EPS)
    if case.norm == "BatchNorm":
        return lambda x, **z: library.batch_norm(x, *running, **fused, **z)
    if case.norm == "GroupNorm":
        return lambda x, **z: library.group_norm(x, case.groups, g.weight, g.bias, EPS, **fused, **z)
    return lambda x, **z: library.instance_norm(x, *running, **fused, **z)


def fused(case: Case, device: torch.device) -> Contender:
    g = given(case, device)
    norm = normalization(case, g, bnfast.functional, activation=case.activation)
    why = bnfast.dispatch.reason_for_torch(torch.empty(2, 8, 2, 2, device=device))
    ran = "Triton" if why is None else "plain torch"
    return Contender(ran, lambda x, z: norm(x, residual=z), g.parameters)


def composed(case: Case, g: Given) -> Forward:
    """norm, add and activation, one after another."""
    norm, act = normalization(case, g, F), Activation.of(case.activation)
    return lambda x, z: after(act, norm(x), z)


def backend(case: Case, device: torch.device) -> str:
    """Who computes torch's own layer: "Cudnn", "Miopen" or "Native" (ATen)."""
    if case.norm == "GroupNorm":
        return "Native"
    g = given(case, device)
    vectors = [g.weight, g.bias, g.running_mean, g.running_var]
    x = case.empty(device)
    if case.norm == "InstanceNorm":
        # torch runs it as a batch norm of one sample, with a channel for each sample's channel; whether it
        # has running statistics does not matter in training, and here they cannot be left out
        n, c, *size = case.shape
        vectors = [v.detach().repeat(n) for v in (g.weight, g.bias, g.bias, g.weight)]
        x = torch.empty((1, n * c, *size), dtype=case.dtype, device=device)
    return str(torch._C._select_batch_norm_backend(x, *vectors, True, EPS)).rpartition(".")[2]


def torchs(case: Case, device: torch.device) -> Contender:
    g = given(case, device)
    return Contender(backend(case, device), composed(case, g), g.parameters)


def without_cudnn(case: Case, device: torch.device) -> Contender:
    """The backward is of the forward's kind: torch keeps the choice with what it saves."""
    g = given(case, device)
    forward = composed(case, g)

    def native(x: Tensor, z: Tensor | None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return forward(x, z)

    return Contender("Native", native, g.parameters)


def same_as_torch(case: Case, device: torch.device) -> str | None:
    if device.type == "cuda" and backend(case, device) == "Native":
        return "torch's own choice is ATen already for this case"
    return None


def no_cudnn(case: Case, device: torch.device) -> str | None:
    if case.norm != "BatchNorm":
        return f"cuDNN's operator in torch is BatchNorm's, not {case.norm}'s"
    available = device.type == "cuda" and torch.backends.cudnn.is_available()
    return None if available else "needs a GPU with cuDNN"


def with_cudnn(case: Case, device: torch.device) -> Contender:
    """cuDNN's BatchNorm asked for by name, where torch's own choice may be another."""
    g, act = given(case, device), Activation.of(case.activation)
    vectors = (g.weight, g.bias, g.running_mean, g.running_var)

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        y, *_ = torch.ops.aten.cudnn_batch_norm(x, *vectors, True, MOMENTUM, EPS)
        return after(act, y, z)

    return Contender(f"cuDNN {torch.backends.cudnn.version()}", forward, g.parameters)


def compiled(mode: str, case: Case, device: torch.device) -> Contender:
    g = given(case, device)
    forward = torch.compile(composed(case, g), dynamic=False, fullgraph=True, mode=mode)
    return Contender(f"inductor, {mode}", forward, g.parameters, countable=False)


def forget() -> None:
    """Of other cases: all are the same code to torch.compile, which gives up after a few versions of it, and
    looks through all of them at each call."""
    torch.compiler.reset()


# GroupNorms of other libraries, written from their sources (apex.contrib.group_norm and
# liger_kernel.ops.group_norm). Neither has run here; results are checked before anything is timed.


def unable(module: str, layout: str, case: Case, device: torch.device) -> str | None:
    if case.norm != "GroupNorm":
        return f"it has no {case.norm}"
    if device.type != "cuda":
        return "needs a GPU"
    if case.layout != layout or (case.channels_last and len(case.shape) != 4):
        return f"it takes {'4-D ' * (layout == 'channels_last')}{layout} x only"
    return lacks(module)


def apex(case: Case, device: torch.device) -> Contender:
    """With SiLU inside where that follows, as it is made for."""
    g, inside = given(case, device), case.activation == "silu" and not case.residual
    kinds = {"device": device, "dtype": case.parameter_dtype, "act": "silu" if inside else ""}
    library: Any = importlib.import_module("apex.contrib.group_norm")
    layer = library.GroupNorm(case.groups, case.shape[1], EPS, **kinds)
    with torch.no_grad():
        layer.weight.copy_(g.weight)
        layer.bias.copy_(g.bias)
    act = None if inside else Activation.of(case.activation)
    return Contender("apex", lambda x, z: after(act, layer(x), z), [layer.weight, layer.bias])


def liger(case: Case, device: torch.device) -> Contender:
    """It takes [N, C, S]: views both ways."""
    g, act = given(case, device), Activation.of(case.activation)
    function: Any = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        y = function.apply(x.flatten(2), g.weight, g.bias, case.shape[1], case.groups, EPS)
        return after(act, y.view(x.shape), z)

    return Contender("Liger", forward, g.parameters)


MAX_AUTOTUNE = "max-autotune-no-cudagraphs"  # graphs are made here, the same for everybody
APEX, LIGER = (
    partial(unable, "apex.contrib.group_norm", "channels_last"),
    partial(unable, "liger_kernel.ops.group_norm", "contiguous"),
)
ALL = (
    Baseline("bnfast", "one call with activation= and residual=", anything, fused),
    Baseline("torch", "torch.nn.functional, then + and the activation", anything, torchs),
    Baseline("native", "the same with cuDNN switched off: ATen's kernels", same_as_torch, without_cudnn),
    Baseline("cudnn-op", "aten's cudnn_batch_norm, then + and the activation", no_cudnn, with_cudnn),
    Baseline("compile", "torch.compile of the expression", anything, partial(compiled, "default"), forget),
    Baseline("compile-max", "the same, autotuned", anything, partial(compiled, MAX_AUTOTUNE), forget),
    Baseline("apex", "apex.contrib.group_norm.GroupNorm, SiLU inside", APEX, apex),
    Baseline("liger", "Liger's GroupNorm, then + and the activation", LIGER, liger),
)  # fmt: skip
