"""Activations and residuals inside the kernels on a GPU: numbers, memory, bits, graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfast
from bnfast.kernels.epilogue import NAMES
from tests.gpu.test_streams import recorded
from tests.support.buffers import assert_same_bits, bit_identical, nan_filled_allocations
from tests.support.families import BF16, DTYPES, FP32
from tests.support.fused_cases import LAYERS, Named, check, given, ours, run

pytestmark = pytest.mark.gpu

every_layer = pytest.mark.parametrize("layer", LAYERS)
every_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
# split over programs; not; odd channels; odd planes; 7x7; a value a channel of a sample; volumes
SHAPES = (
    (16, 64, 56, 56), (8, 256, 14, 14), (5, 24, 9, 11), (4, 40, 17, 17), (64, 512, 7, 7), (300, 96),
    (2, 16, 8, 20, 24),
)  # fmt: skip
CASES = [
    *(((8, 64, 14, 14), BF16, activation) for activation in (*NAMES, ("leaky_relu", 0.2), ("elu", 0.5))),
    *((shape, dtype, "relu") for shape, dtype in itertools.product(SHAPES, DTYPES)),
]


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@every_layout
@pytest.mark.parametrize(("shape", "dtype", "activation"), CASES, ids=str)
@every_layer
def test_against_fp64(
    layer: str, shape: tuple[int, ...], dtype: torch.dtype, activation: Any, layout: str, residual: bool
) -> None:
    if layer == "instance" and len(shape) == 2:
        pytest.skip("InstanceNorm has no such input")
    g = given(shape, dtype, layer, layout, residual, device="cuda")
    before = {name: t.clone() for name, t in g.items()}
    with nan_filled_allocations():
        found = run(ours(layer, activation), g)
    assert all(bit_identical(g[name], before[name]) for name in g)
    check(layer, activation, g, found)


@every_layout
@pytest.mark.parametrize("activation", ["relu", "silu"])
@every_layer
def test_same_bits_every_time(layer: str, activation: str, layout: str) -> None:
    g = given((16, 64, 28, 28), BF16, layer, layout, device="cuda")
    first = run(ours(layer, activation), g)
    for _ in range(3):
        assert_same_bits(run(ours(layer, activation), g), first)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = bnfast.BatchNorm2d(32, activation="relu")
        self.second = bnfast.BatchNorm2d(32, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * 0.5, x)


def step(block: Any, x: Tensor, dy: Tensor) -> Named:
    x = x.detach().requires_grad_()
    y = block(x)
    wanted = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_cuda_graph(dtype: torch.dtype) -> None:
    """A training step of a residual block, captured and replayed on other numbers."""
    block = Block().cuda()
    x, dy = (torch.randn(8, 32, 28, 28, device="cuda", dtype=dtype) for _ in range(2))
    step(block, x, dy)
    graph, found = recorded(lambda: step(block, x, dy))
    x.copy_(torch.randn_like(x) + 3)
    graph.replay()
    assert_same_bits(found, step(block, x, dy))


def test_inductor() -> None:
    block = Block().cuda()
    x, dy = (torch.randn(8, 32, 28, 28, device="cuda") for _ in range(2))
    found, expected = step(torch.compile(block, fullgraph=True), x, dy), step(block, x, dy)
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["x"], expected["x"], rtol=1e-3, atol=1e-3)
