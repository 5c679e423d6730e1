"""What differs between the PyTorch versions that are tested."""

from __future__ import annotations

import inspect

import torch
from torch import nn

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# torch's batch_norm takes eps=0 in eval since 2.13.
EPS_0_IN_EVAL = TORCH >= (2, 13)
# torch.nn's norms take bias=False since 2.13.
BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters
WITHOUT_BIAS: tuple[dict[str, bool], ...] = ({"bias": False},) if BIAS else ()
