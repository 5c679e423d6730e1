"""The operators that graphs hold: torch.library's checks of their schemas (who is mutated, who aliases), of
fake tensors, and of dynamic shapes through AOTAutograd; graphs recorded by make_fx and around transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import bnfast
from bnfast.checks import cases
from tests.support import fused_cases
from tests.support.layers import both_layouts, both_modes, data

OPERATORS = torch.ops.bnfast
SHAPE = (3, 4, 3, 2)


def arguments(layout: Any, dtype: torch.dtype, given: str, shape: tuple[int, ...] = SHAPE) -> list[Any]:
    """x, weight, bias, running_mean, running_var, of which `given` says what is there."""
    x = data(*shape, dtype=dtype)
    x = x.contiguous(memory_format=layout) if isinstance(layout, torch.memory_format) else layout(x)
    channels = x.shape[1]
    tensors = {n: data(channels, seed=s).square() + 0.1 for s, n in enumerate("wbmv", 1)}
    return [x, *(tensors[n] if n in given else None for n in "wbmv")]


CASES = {
    "all": (torch.contiguous_format, torch.float32, "wbmv"),
    "channels_last, bf16": (torch.channels_last, torch.bfloat16, "wbmv"),
    "fp64, no bias": (torch.contiguous_format, torch.float64, "wmv"),
    "fp16, no affine": (torch.channels_last, torch.float16, "mv"),
    "no statistics": (torch.contiguous_format, torch.float32, "wb"),
    "x alone, transposed": (lambda x: x.transpose(0, 3), torch.float32, ""),
    "2-D": (lambda x: x.flatten(2).mean(2), torch.float32, "wbmv"),
}


@pytest.mark.parametrize("cumulative", [False, True], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_opcheck_train(case: Any, cumulative: bool) -> None:
    batches = torch.tensor(3) if cumulative else None
    torch.library.opcheck(
        OPERATORS.batch_norm_train, (*arguments(*case), batches, cumulative, 0.1, 1e-5, True)
    )


@pytest.mark.parametrize("keep", [False, True], ids=["inference", "for backward"])
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if "m" in c[2]], ids=[k for k, c in CASES.items() if "m" in c[2]]
)
def test_opcheck_eval(case: Any, keep: bool) -> None:
    torch.library.opcheck(OPERATORS.batch_norm_eval, (*arguments(*case), 1e-5, keep))


WANTED = {
    "all": (True, torch.float32, torch.float32),
    "dx": (True, None, None),
    "parameters": (False, torch.bfloat16, torch.float64),
    "weight": (False, torch.float32, None),
}


@both_modes
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
@pytest.mark.parametrize("name", ["all", "channels_last, bf16", "x alone, transposed", "2-D"])
def test_opcheck_backward(name: str, wanted: tuple[Any, ...], training: bool) -> None:
    x, weight, bias, *_ = arguments(*CASES[name])
    y, table, _ = OPERATORS.batch_norm_train(x, weight, bias, None, None, None, False, 0.1, 1e-5, True)
    dy = data(*y.shape, seed=5).to(y.dtype)  # contiguous, whatever y is
    torch.library.opcheck(OPERATORS.batch_norm_backward, (x, dy, table, None, None, training, *wanted))


def test_make_fx() -> None:
    """A graph recorded from a training step has the operators and updates the buffers it is given."""
    module, x = bnfast.BatchNorm2d(4), data(*SHAPE)

    def loss(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        state = {k: v.detach().requires_grad_() if k in ("weight", "bias") else v for k, v in state.items()}
        y = torch.func.functional_call(module, state, (x,))
        return y, *torch.autograd.grad(y.square().sum(), (state["weight"], state["bias"]))

    given, expected = ({k: v.clone() for k, v in module.state_dict().items()} for _ in range(2))
    graph = make_fx(loss, tracing_mode="symbolic")({k: v.clone() for k, v in given.items()}, x)
    assert "bnfast.batch_norm_train" in graph.code
    assert "bnfast.batch_norm_backward" in graph.code
    x = data(5, *SHAPE[1:], seed=1)
    assert_close(graph(given, x), loss(expected, x))
    assert given["num_batches_tracked"] == 1
    assert_close(given, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_opcheck_batch_renorm(momentum: float | None) -> None:
    x, mean, var = torch.randn(4, 3, 2, 2), torch.zeros(3), torch.ones(3)
    arguments = (
        x, torch.ones(3), None, mean, var, torch.tensor(5), momentum is None, 0.1, 1e-5,
        [3.0, 5.0, 0.0, 9.0, 9.0], True, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bnfast.batch_renorm_train.default, arguments)


@both_layouts
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_opcheck_group_norm(affine: bool, last: bool) -> None:
    case = cases.group_norm((2, 6, 3, 4), torch.float32, last, groups=3, affine=affine)
    g = cases.given(case, torch.device("cpu"))
    torch.library.opcheck(OPERATORS.group_norm_forward, (g.x, g.weight, g.bias, 3, 1e-5, "group_norm", True))
    _, table, _ = OPERATORS.group_norm_forward(g.x, g.weight, g.bias, 3, 1e-5, "group_norm", True)
    for wanted in ((True, torch.float32, torch.float32), (True, None, None), (False, None, torch.bfloat16)):
        torch.library.opcheck(
            OPERATORS.group_norm_backward, (g.x, g.dy, table, g.weight, None, 3, "group_norm", *wanted)
        )


LAYER_NORMS = {
    "fp32": ((4, 6), torch.float32, True, 1),
    "bf16, two dimensions": ((3, 2, 6), torch.bfloat16, True, 2),
    "fp64, x alone": ((4, 6), torch.float64, False, 1),
    "no batch": ((4, 6), torch.float32, True, 2),
}
LAYER_WANTED = ((True, torch.float32, torch.float32), (True, None, None), (False, torch.float64, None))


@pytest.mark.parametrize(("shape", "dtype", "affine", "dims"), LAYER_NORMS.values(), ids=LAYER_NORMS.keys())
def test_opcheck_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, affine: bool, dims: int) -> None:
    for x in (data(*shape).to(dtype), data(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape))))):
        weight, bias = (data(*shape[-dims:], seed=n) if affine else None for n in (1, 2))
        for keep in (True, False):
            torch.library.opcheck(OPERATORS.layer_norm, (x, weight, bias, dims, 1e-5, keep))
        y, table, _ = OPERATORS.layer_norm(x, weight, bias, dims, 1e-5, True)
        for wanted in LAYER_WANTED:
            given = (x, y.clone(), table, weight, None, dims, *wanted)
            torch.library.opcheck(OPERATORS.layer_norm_backward, given)


@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (2, 5, 3, 3)], ids=["signs", "z"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_with_activations_and_residuals(shape: tuple[int, ...], layout: str) -> None:
    g = fused_cases.given(shape, torch.float32, "train", layout)
    x, dy, z, weight, bias = (g[name] for name in ("x", "dy", "z", "weight", "bias"))
    wanted = (True, torch.float32, torch.float32)
    for name, after in (("relu", ("relu", 0.0, z, True)), ("silu", ("silu", 0.0, z, False))):
        trained = (x, weight, bias, None, None, None, False, 0.1, 1e-5, True, *after)
        torch.library.opcheck(OPERATORS.batch_norm_train, trained)
        _, table, signs = OPERATORS.batch_norm_train(*trained)
        kept = signs if signs.numel() else z
        torch.library.opcheck(
            OPERATORS.batch_norm_backward, (x, dy, table, None, None, True, *wanted, name, 0.0, kept)
        )
        grouped = (x, weight, bias, 1, 1e-5, "group_norm", True, *after)
        torch.library.opcheck(OPERATORS.group_norm_forward, grouped)
        _, table, signs = OPERATORS.group_norm_forward(*grouped)
        kept = signs if signs.numel() else z
        given_ = (x, dy, table, weight, bias, 1, "group_norm", *wanted, name, 0.0, kept)
        torch.library.opcheck(OPERATORS.group_norm_backward, given_)


def test_compiled_transform() -> None:
    module = bnfast.BatchNorm1d(2, track_running_stats=False).double()
    x = data(3, 4, 2, dtype=torch.float64)

    def slopes(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda v: module(v).pow(3).sum()))(x)

    assert_close(torch.compile(slopes, fullgraph=True, backend="aot_eager")(x), slopes(x))
