"""LayerNorm on a GPU: numbers, bits, streams of memory that the interpreter does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast import functional
from bnfast.checks import one_step, truth
from bnfast.checks.cases import Case, Given, layer_norm
from bnfast.kernels.launch import Launch
from tests.gpu import parity
from tests.gpu.test_large import need_memory
from tests.support.buffers import bit_identical
from tests.support.families import BF16, DTYPES, FP16, FP32, FP64, in_dtypes, parameters

pytestmark = pytest.mark.gpu

# one of each form of the plan, and widths around what is held
WIDTHS = (1, 3, 7, 64, 100, 256, 384, 768, 1000, 1001, 1024, 2048, 3072, 4096, 5000, 8192)
WIDE = (12288, 12296, 16384, 20000, 28680, 32769, 100_001, 1_000_000)
MEANS = ((FP16, 100.0), (BF16, 100.0), (FP32, 1e4), (FP64, 1e8))
GROUPS = {
    "widths": in_dtypes(layer_norm((rows, width)) for width in WIDTHS for rows in (1, 37, 4099)),
    "wide": in_dtypes(
        layer_norm((rows, width)) for width in WIDE for rows in (1, 300 if width < 100_000 else 7)
    ),
    "means": [layer_norm((65, w), dtype, mean=mean) for w in (7, 768, 4096, 20000) for dtype, mean in MEANS],
    "parameters": in_dtypes(layer_norm((130, 768), parameters=parameters) for parameters in DTYPES),
    "lacking": [
        layer_norm((130, width), BF16, affine=affine, bias=False)
        for width in (768, 20000)
        for affine in (True, False)
    ],
}


@pytest.mark.parametrize("case", parameters(GROUPS))
def test_against_fp64(case: Case) -> None:
    parity.check(case)


@pytest.mark.parametrize("width", [768, 20000])
def test_a_bias_alone(width: int) -> None:
    g = parity.given(layer_norm((130, width), BF16))
    results = []
    for weight in (None, torch.ones_like(g.weight)):
        x, bias = g.x.detach().requires_grad_(), g.bias.detach().requires_grad_()
        y = functional.layer_norm(x, (width,), weight, bias)
        results.append([y.detach(), *torch.autograd.grad(y, [x, bias], g.dy)])
    assert all(bit_identical(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cut", [1, 2, 4, 8])
def test_unaligned_storage(cut: int) -> None:
    """All tensors, or x alone, or the parameters alone: compiled code is bound to none of these."""
    case = layer_norm((33, 768), BF16, parameters=BF16)
    g = parity.given(case)

    def moved(t: Tensor) -> Tensor:
        return torch.zeros(t.numel() + cut, dtype=t.dtype, device=t.device)[cut:].view(t.shape).copy_(t)

    for which in ("", "x dy", "weight", "bias", "x dy weight bias", "dy"):
        other = replace(g, **{name: moved(getattr(g, name)) for name in which.split()})
        verdicts = truth.judge(case, other, one_step.run(case, bnfast, other))
        assert all(verdict.ok for verdict in verdicts.values()), {n: str(v) for n, v in verdicts.items()}


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
    case = layer_norm((257, 776), BF16)
    for _ in range(2):
        one_step.run(case, bnfast, parity.given(case))
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
    y = functional.layer_norm(x, (width,))
    y.backward(dy)
    assert x.grad is not None
    for row in {0, 1, rows // 2, (1 << 31) // width % rows, rows - 1}:
        x_row, dy_row, y_row, dx_row = (t.detach()[row : row + 1] for t in (x, dy, y, x.grad))
        case, empty = layer_norm((1, width), BF16, affine=False), x.new_empty(0)
        verdicts = truth.judge(
            case, Given(x_row, dy_row, None, None, empty, empty), {"y": y_row, "dx": dx_row}
        )
        assert all(verdict.ok for verdict in verdicts.values()), row
