"""Everything that a few training steps of a model leave behind, to compare two models by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _tensor(output: Any) -> Tensor:
    """Segmentation models return a dict, Inception in training a tuple."""
    if isinstance(output, dict):
        return output["out"]
    return output[0] if isinstance(output, tuple) else output


def record(model: nn.Module, *inputs: Tensor, steps: int = 2) -> dict[str, Tensor]:
    """Outputs and all gradients of each step, then state_dict, the optimizer's momenta and an eval output."""
    seen: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)  # for dropout and stochastic depth
        optimizer.zero_grad()
        fed = [(x + 0.1 * step).detach().requires_grad_() for x in inputs]
        y = _tensor(model(*fed))
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        gradients = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients |= {f"dx{i}": x.grad for i, x in enumerate(fed) if x.grad is not None}
        seen |= {f"step {step} {name}": value.clone() for name, value in gradients.items()}
        seen[f"step {step} y"] = y.detach()
        optimizer.step()
    seen |= {name: value.clone() for name, value in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        seen[f"momentum {i}"] = state["momentum_buffer"]
    with torch.no_grad():
        seen["eval"] = _tensor(model.eval()(*inputs))
    return seen


def assert_same_training(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float = 1e-9) -> None:
    """Equal to `bound`, relative to the largest value of each tensor; NaN nowhere."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.isfinite(expected).all(), name
        off = (ours[name].double() - expected.double()).abs().max()
        assert off <= bound * expected.double().abs().max(), (name, off)
