"""cuDNN's BatchNorm asked for by name, where torch's own choice may be another."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines.contender import Baseline, Contender
from benchmarks.baselines.given import EPS, MOMENTUM, given
from benchmarks.baselines.pytorch import after
from bnfast.activation import Activation
from codegen.cases import Case


def _unable(case: Case, device: torch.device) -> str | None:
    if case.norm != "BatchNorm":
        return f"cuDNN's operator in torch is BatchNorm's, not {case.norm}'s"
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return "needs a GPU with cuDNN"
    return None


def _operator(case: Case, device: torch.device) -> Contender:
    g, act = given(case, device), Activation.of(case.activation)

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        vectors = (g.weight, g.bias, g.running_mean, g.running_var)
        y, *_ = torch.ops.aten.cudnn_batch_norm(x, *vectors, True, MOMENTUM, EPS)
        return after(act, y, z)

    return Contender(f"cuDNN {torch.backends.cudnn.version()}", forward, g.parameters)


ALL = (
    Baseline("cudnn-op", "aten's cudnn_batch_norm, then + and the activation", _unable, _operator),
)  # fmt: skip
