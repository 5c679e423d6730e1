"""bnfast, and what PyTorch itself offers: its layers as users write them, without cuDNN, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import bnfast
from benchmarks.baselines.contender import Baseline, Contender
from benchmarks.baselines.given import EPS, MOMENTUM, Given, given
from bnfast.activation import Activation
from codegen.cases import Case

Forward = Callable[[Tensor, Tensor | None], Tensor]


def anything(case: Case, device: torch.device) -> str | None:
    return None


def _bnfast(case: Case, device: torch.device) -> Contender:
    g, act, functional = given(case, device), case.activation, bnfast.functional

    def batch(x: Tensor, z: Tensor | None) -> Tensor:
        state = (g.running_mean, g.running_var, g.weight, g.bias, True, MOMENTUM, EPS)
        return functional.batch_norm(x, *state, activation=act, residual=z)

    def group(x: Tensor, z: Tensor | None) -> Tensor:
        return functional.group_norm(x, case.groups, g.weight, g.bias, EPS, activation=act, residual=z)

    def instance(x: Tensor, z: Tensor | None) -> Tensor:
        return functional.instance_norm(
            x, None, None, g.weight, g.bias, True, MOMENTUM, EPS, activation=act, residual=z
        )

    forward = {"BatchNorm": batch, "GroupNorm": group, "InstanceNorm": instance}[case.norm]
    x = torch.empty(2, 8, 2, 2, device=device)
    why = bnfast.dispatch.reason_for_torch(x)
    return Contender("Triton" if why is None else "plain torch", forward, g.parameters)


def after(act: Activation | None, y: Tensor, z: Tensor | None) -> Tensor:
    y = y if z is None else y + z
    return y if act is None else act.apply(y)


def normalization(case: Case, g: Given) -> Callable[[Tensor], Tensor]:
    """norm(x) by torch.nn.functional."""
    if case.norm == "BatchNorm":
        return lambda x: F.batch_norm(x, g.running_mean, g.running_var, g.weight, g.bias, True, MOMENTUM, EPS)
    if case.norm == "GroupNorm":
        return lambda x: F.group_norm(x, case.groups, g.weight, g.bias, EPS)
    return lambda x: F.instance_norm(x, None, None, g.weight, g.bias, True, MOMENTUM, EPS)


def _composed(case: Case, g: Given) -> Forward:
    """norm, add and activation, one after another."""
    norm, act = normalization(case, g), Activation.of(case.activation)
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


def _torch(case: Case, device: torch.device) -> Contender:
    g = given(case, device)
    return Contender(backend(case, device), _composed(case, g), g.parameters)


def _without_cudnn(case: Case, device: torch.device) -> Contender:
    """The backward is of the forward's kind: torch keeps the choice with what it saves."""
    g = given(case, device)
    forward = _composed(case, g)

    def native(x: Tensor, z: Tensor | None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return forward(x, z)

    return Contender("Native", native, g.parameters)


def _same_as_torch(case: Case, device: torch.device) -> str | None:
    if device.type == "cuda" and backend(case, device) == "Native":
        return "torch's own choice is ATen already for this case"
    return None


def _compiled(mode: str, case: Case, device: torch.device) -> Contender:
    g = given(case, device)
    forward = torch.compile(_composed(case, g), dynamic=False, fullgraph=True, mode=mode)
    return Contender(f"inductor, {mode}", forward, g.parameters, countable=False)


def _forget() -> None:
    """Of other cases: all are the same code to torch.compile, which gives up after a few versions of it, and
    looks through all of them at each call."""
    torch.compiler.reset()


MAX_AUTOTUNE = "max-autotune-no-cudagraphs"  # graphs are made here, the same for everybody
ALL = (
    Baseline("bnfast", "one call with activation= and residual=", anything, _bnfast),
    Baseline("torch", "torch.nn.functional, then + and the activation", anything, _torch),
    Baseline("native", "the same with cuDNN switched off: ATen's kernels", _same_as_torch, _without_cudnn),
    Baseline(
        "compile", "torch.compile of the whole expression", anything, partial(_compiled, "default"), _forget),
    Baseline("compile-max", "the same, autotuned", anything, partial(_compiled, MAX_AUTOTUNE), _forget),
)  # fmt: skip
