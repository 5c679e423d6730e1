"""LayerNorm on a GPU: numbers, bits, streams of memory that the interpreter does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.functional import layer_norm
from bnfast.kernels.launch import Launch
from tests.gpu.test_large import need_memory
from tests.support.buffers import bit_identical, nan_filled_allocations
from tests.support.row_oracle import check, given, run

pytestmark = pytest.mark.gpu

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FP16, BF16, FP32, FP64)
# one of each form of the plan, and widths around what is held
WIDTHS = (1, 3, 7, 64, 100, 256, 384, 768, 1000, 1001, 1024, 2048, 3072, 4096, 5000, 8192)
WIDE = (12288, 12296, 16384, 20000, 28680, 32769, 100_001, 1_000_000)


def passes(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
    g = given(shape, dtype, device="cuda", **options)
    with nan_filled_allocations():
        ours = run(layer_norm, g)
    check(g, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, dtype: torch.dtype) -> None:
    for rows in (1, 37, 4099):
        passes((rows, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDE)
def test_wide_rows(width: int, dtype: torch.dtype) -> None:
    for rows in (1, 300 if width < 100_000 else 7):
        passes((rows, width), dtype)


@pytest.mark.parametrize(("dtype", "mean"), [(FP16, 100.0), (BF16, 100.0), (FP32, 1e4), (FP64, 1e8)], ids=str)
@pytest.mark.parametrize("width", [7, 768, 4096, 20000])
def test_large_means(width: int, dtype: torch.dtype, mean: float) -> None:
    passes((65, width), dtype, mean=mean)


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_their_own_dtype(dtype: torch.dtype, parameters: torch.dtype) -> None:
    passes((130, 768), dtype, parameters=parameters)


@pytest.mark.parametrize("affine", ["", "w", "b"])
@pytest.mark.parametrize("width", [768, 20000])
def test_without_parameters(width: int, affine: str) -> None:
    passes((130, width), BF16, affine=affine, dims=1)


@pytest.mark.parametrize("cut", [1, 2, 4, 8])
def test_unaligned_storage(cut: int) -> None:
    """All tensors, or x alone, or the parameters alone: compiled code is bound to none of these."""
    g = given((33, 768), BF16, device="cuda", parameters=BF16)

    def moved(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return torch.zeros(t.numel() + cut, dtype=t.dtype, device="cuda")[cut:].view(t.shape).copy_(t)

    for which in ("", "x dy", "weight", "bias", "x dy weight bias", "dy"):
        changed = {name: moved(value) if name in which.split() else value for name, value in vars(g).items()}
        other = type(g)(**changed)
        check(other, run(layer_norm, other))


@pytest.mark.parametrize("width", [768, 4096, 20000])
def test_same_bits_every_time(width: int) -> None:
    g = given((2051, width), BF16, device="cuda")
    first = run(layer_norm, g)
    for _ in range(3):
        again = run(layer_norm, g)
        assert all(bit_identical(first[name], again[name]) for name in first)


@pytest.mark.parametrize("width", [768, 20000])
def test_cuda_graph(width: int) -> None:
    """A training step, captured and replayed on other numbers."""
    module = bnfast.LayerNorm(width, device="cuda")
    x = torch.randn(129, width, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        grads = torch.autograd.grad(module(x), (x, module.weight, module.bias), dy)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = module(x)
        grads = torch.autograd.grad(y, (x, module.weight, module.bias), dy)
    with torch.no_grad():
        x.copy_(torch.randn_like(x) + 3)
    graph.replay()
    again = module(x)
    expected = torch.autograd.grad(again, (x, module.weight, module.bias), dy)
    assert bit_identical(y, again)
    assert all(bit_identical(a, b) for a, b in zip(grads, expected, strict=True))


def test_autocast_keeps_the_dtype() -> None:
    module = bnfast.LayerNorm(768, device="cuda")
    x = torch.randn(64, 768, device="cuda", dtype=BF16, requires_grad=True)
    with torch.autocast("cuda", BF16):
        y = module(x)
    assert y.dtype == BF16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == BF16
    assert module.weight.grad.dtype == FP32


def test_inductor() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), bnfast.LayerNorm(96), torch.nn.GELU()).cuda()
    x = torch.randn(50, 64, device="cuda")
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()


def test_the_second_call_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on a launch costs a microsecond of the host's time instead of ten."""
    seen: list[Launch] = []
    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (seen.append(self), call(self, *args))[1])
    g = given((257, 776), BF16, device="cuda")
    for _ in range(2):
        run(layer_norm, g)
    assert len(seen) == 6
    if torch.version.hip is None:
        assert all(launch._bound is not None for launch in seen)


@pytest.mark.parametrize(("rows", "width"), [(2_900_000, 768), (135_000, 16384), (2, 1 << 29)], ids=str)
def test_more_elements_than_32_bits_count(rows: int, width: int) -> None:
    """Rows of the beginning, the middle and the end, compared one by one with fp64."""
    large = rows * width > 1 << 31
    need_memory(6 * rows * width * 2 / (1 << 30) + 8)
    assert large or width == 1 << 29
    x = torch.empty(rows, width, dtype=BF16, device="cuda").normal_()
    dy = torch.empty_like(x).normal_()
    x.requires_grad_()
    y = layer_norm(x, (width,))
    y.backward(dy)
    assert x.grad is not None
    for row in {0, 1, rows // 2, (1 << 31) // width % rows, rows - 1}:
        g = type(given((1, 1), BF16))(x.detach()[row : row + 1], dy[row : row + 1], None, None)
        check(g, {"y": y.detach()[row : row + 1], "dx": x.grad[row : row + 1]})
