"""The jobs `memory`, whose fake tensors keep what real ones do, and `host`, whose sides agree."""

from __future__ import annotations

import pandas as pd
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
    assert sum(real.values()) > 0
    assert torch.get_default_dtype() == torch.float32


def test_nothing_but_the_input_and_a_bit_an_element() -> None:
    """Of norm, add and relu; two bytes an element of the norm's input, and statistics in fp32."""
    x = torch.randn(2, 16, 8, 8, dtype=torch.bfloat16)
    block = memory.VARIANTS["fused"](Bottleneck(16, 4, 1, nn.ReLU).to(torch.bfloat16))
    found = memory.kept(block, x)
    assert found["bn3"] == x.nbytes + x.numel() // 8 + 4 * 16 * 4
    assert found["act"] == 0


def test_blocks_add_up() -> None:
    found = memory.count("silu", "fused")
    blocks = memory.by_block(pd.DataFrame({"bytes": found}))["bytes"]
    layers = [f"layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]
    assert list(blocks.index) == ["stem", *layers, "head", "total"]
    assert blocks["total"] == blocks[:-1].sum() == sum(found.values())
    assert sum(found.values()) < 0.75 * sum(memory.count("silu", "torch.nn").values())


def test_is_resnet50() -> None:
    with torch.device("meta"):
        model = resnet50()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032  # as published with torchvision's
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 53
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_both_sides_compute_the_same(path: str) -> None:
    found = host.calls()
    assert len(found) == 8
    for (name, mode), (ours, theirs) in found.items():
        y, expected = ours(), theirs()
        assert (y - expected).abs().max() < 1e-5, name
        assert y.requires_grad == expected.requires_grad == (mode == "with gradient")
