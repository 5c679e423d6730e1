"""What the first look counts of memory, with fake tensors that keep what real ones do; and the job `host`,
whose sides agree."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import host, memory
from benchmarks.resnet import Bottleneck, resnet50

pytestmark = pytest.mark.slow


def network(activation: str) -> nn.Module:
    act = memory.ACTIVATIONS[activation]
    stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), act())
    return nn.Sequential(stem, Bottleneck(8, 4, 2, act), Bottleneck(16, 4, 1, act))


@pytest.mark.parametrize("variant", memory.VARIANTS)
@pytest.mark.parametrize("activation", memory.ACTIVATIONS)
def test_fake_tensors_keep_what_real_ones_do(activation: str, variant: str) -> None:
    """In the interpreter, where the kernels run."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)

    def kept(x: torch.Tensor) -> dict[str, int]:
        return memory.kept(memory.VARIANTS[variant](memory.in_bf16(lambda: network(activation))), x)

    real = kept(x)
    with FakeTensorMode() as mode:
        assert kept(mode.from_tensor(x)) == real
    assert min(real.values()) > 0
    assert torch.get_default_dtype() == torch.float32


def test_a_tensor_counts_once_and_a_parameter_never() -> None:
    """Of two layers that keep the same input, and the second one its own weight as well."""
    layers = OrderedDict(first=nn.Sequential(nn.Linear(4, 4), nn.ReLU()), second=nn.Linear(4, 4))
    assert memory.kept(nn.Sequential(layers), torch.ones(2, 4)) == {"first": 2 * 2 * 4 * 4, "second": 0}


def test_bnfast_keeps_less_of_resnet50() -> None:
    ours, theirs = (sum(memory.count("silu", variant).values()) for variant in ("fused", "torch.nn"))
    assert 0 < ours < 0.75 * theirs


def test_is_resnet50() -> None:
    with torch.device("meta"):
        model = resnet50()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032  # as published with torchvision's
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 53
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_both_sides_compute_the_same(path: str) -> None:
    for name, ours, theirs in host.calls():
        y, expected = ours(), theirs()
        assert (y - expected).abs().max() < 1e-5, name
        assert y.requires_grad == expected.requires_grad == name.endswith(", with gradient")
