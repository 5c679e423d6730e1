"""GroupNorms of other libraries, where they are installed: NVIDIA's apex, and Liger.

Written from their sources (apex.contrib.group_norm, liger_kernel.ops.group_norm); neither has run here, so
results are checked before anything is timed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.contender import Baseline, Contender, lacks
from benchmarks.baselines.given import EPS, given
from benchmarks.baselines.pytorch import after
from bnfast.activation import Activation
from codegen.cases import Case


def _unable(module: str, case: Case, device: torch.device) -> str | None:
    if case.norm != "GroupNorm":
        return f"it has no {case.norm}"
    if device.type != "cuda":
        return "needs a GPU"
    return lacks(module)


def _apex_unable(case: Case, device: torch.device) -> str | None:
    why = _unable("apex.contrib.group_norm", case, device)
    if why is None and (not case.channels_last or len(case.shape) != 4):
        return "it takes 4-D channels_last only"
    return why


def _apex(case: Case, device: torch.device) -> Contender:
    """With SiLU inside where that follows, as it is made for."""
    g, inside = given(case, device), case.activation == "silu" and not case.residual
    library: Any = importlib.import_module("apex.contrib.group_norm")
    layer = library.GroupNorm(
        case.groups,
        case.shape[1],
        EPS,
        device=device,
        dtype=case.parameter_dtype,
        act="silu" if inside else "",
    )
    with torch.no_grad():
        layer.weight.copy_(g.weight)
        layer.bias.copy_(g.bias)
    act = None if inside else Activation.of(case.activation)
    return Contender("apex", lambda x, z: after(act, layer(x), z), [layer.weight, layer.bias])


def _liger_unable(case: Case, device: torch.device) -> str | None:
    why = _unable("liger_kernel.ops.group_norm", case, device)
    return "it takes contiguous x only" if why is None and case.channels_last else why


def _liger(case: Case, device: torch.device) -> Contender:
    g, act = given(case, device), Activation.of(case.activation)
    function: Any = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        """It takes [N, C, S]: views both ways."""
        y = function.apply(x.flatten(2), g.weight, g.bias, case.shape[1], case.groups, EPS)
        return after(act, y.view(x.shape), z)

    return Contender("Liger", forward, g.parameters)


ALL = (
    Baseline("apex", "apex.contrib.group_norm.GroupNorm, SiLU inside", _apex_unable, _apex),
    Baseline("liger", "Liger's GroupNorm, then + and the activation", _liger_unable, _liger),
)
