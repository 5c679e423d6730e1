"""Derivatives of the activations in plain torch, differentiable. kernels/activations.py has the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..activation import Activation


def slope(v: Tensor, activation: Activation) -> Tensor:
    """The derivative at v, with torch's choice at corners."""
    name, parameter = activation
    one, zero = torch.ones_like(v), torch.zeros_like(v)
    if name == "relu":
        return torch.where(v <= 0, zero, one)
    if name == "relu6":
        return torch.where((v <= 0) | (v >= 6), zero, one)
    if name == "leaky_relu":
        return torch.where(v > 0, one, parameter * one)
    if name == "elu":
        return torch.where(v <= 0, parameter * torch.exp(v.clamp(max=0)), one)
    if name == "silu":
        s = torch.sigmoid(v)
        return s * (1 + v * (1 - s))
    if name == "gelu":
        density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(v * math.sqrt(0.5))) + v * density
    if name == "gelu_tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v * v * v))
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v * v)
        return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * inner
    if name == "hardswish":
        return torch.where(v <= -3, zero, torch.where(v < 3, v / 3 + 0.5, one))
    if name == "hardsigmoid":
        return torch.where((v > -3) & (v < 3), one / 6, zero)
    if name == "mish":
        t = torch.tanh(torch.nn.functional.softplus(v))
        return t + v * torch.sigmoid(v) * (1 - t * t)
    if name == "sigmoid":
        s = torch.sigmoid(v)
        return s * (1 - s)
    t = torch.tanh(v)
    return 1 - t * t
