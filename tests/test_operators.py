"""The operators that graphs hold: torch.library's checks of their schemas (what is mutated, what aliases), of
fake tensors, and of dynamic shapes through AOTAutograd; graphs recorded by make_fx and around transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import bnfast
from bnfast import functional
from tests.support.layers import BY_NAME, NORMS, data, step

X = data(3, 4, 3, 2)


class Recorder(TorchDispatchMode):
    """Keeps each call of our operators, with copies of its arguments, as some are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bnfast":
            self.calls.append((func, tree_map_only(Tensor, lambda t: t.detach().clone(), args)))
            assert not kwargs
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        for operator, arguments in self.calls:
            opcheck(operator, arguments)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MASKED, NOT_MASKED = (2, 8, 4, 4), (2, 5, 3, 3)  # shapes for which relu keeps a mask, and the residual
VARIANTS: dict[str, Any] = {
    "all": {},
    "inference": {"wanted": ""},
    "x alone": {"wanted": "x"},
    "weight alone": {"wanted": "w"},
    "parameters of other dtypes": {"wanted": "wb", "dtypes": (BF16, FP64)},
    "fp64, no bias": {"dtype": FP64, "dtypes": (FP64, None), "wanted": "xw"},
    "fp16, bare": {"dtype": FP16, "layout": last, "dtypes": (None, None), "wanted": "x"},
    "bf16": {"dtype": BF16, "layout": last},
    "transposed": {"layout": lambda x: x.transpose(0, 3)},
    "2-D": {"layout": lambda x: x.flatten(2).mean(2)},
    "relu, mask": {"activation": "relu", "shape": MASKED},
    "relu, mask, channels_last": {"activation": "relu", "shape": MASKED, "layout": last},
    "relu": {"activation": "relu", "shape": NOT_MASKED},
    "relu, channels_last": {"activation": "relu", "shape": NOT_MASKED, "layout": last},
    "silu": {"activation": "silu", "shape": MASKED},
    "silu, channels_last": {"activation": "silu", "shape": NOT_MASKED, "layout": last},
}


def run(
    norm: str,
    shape: tuple[int, ...] = (3, 4, 3, 2),
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
    dtype: torch.dtype = FP32,
    dtypes: tuple[torch.dtype | None, ...] = (FP32, FP32),
    wanted: str = "xwb",
    activation: str | None = None,
) -> None:
    """A function, with a residual where an activation follows, and its backward. dtypes: of weight and bias.
    wanted: whose gradients."""
    x = layout(data(*shape, dtype=dtype))
    size = x.shape[-1] if norm == "layer" else x.shape[1]
    given = [x, *(None if kind is None else data(size, seed=5, dtype=kind) for kind in dtypes)]
    leaves = [
        t.requires_grad_() for name, t in zip("xwb", given, strict=True) if t is not None and name in wanted
    ]
    after = (
        {}
        if activation is None
        else {"activation": activation, "residual": x.detach().cos().requires_grad_()}
    )
    y = NORMS[norm](functional, *given, **after)
    if wanted:  # dy is contiguous, whatever y is
        torch.autograd.grad(y, leaves, data(*y.shape, seed=5, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if "instance" not in norm])  # GroupNorm's operators
def test_of_functions(norm: str, variant: str) -> None:
    with Recorder() as recorder:
        run(norm, **VARIANTS[variant])
    assert len(recorder.calls) == (1 if variant == "inference" else 2)
    recorder.check()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchRenorm2d"])
def test_of_layers_that_count_batches(name: str, momentum: float | None) -> None:
    module = BY_NAME[name].make()
    module.momentum = momentum
    with Recorder() as recorder:
        step(module, X)
    assert len(recorder.calls) == 2
    recorder.check()


def test_make_fx() -> None:
    """A graph recorded from a training step has the operators and updates the buffers it is given."""
    module = bnfast.BatchNorm2d(4)

    def loss(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        state = {k: v.detach().requires_grad_() if k in ("weight", "bias") else v for k, v in state.items()}
        y = torch.func.functional_call(module, state, (x,))
        return y, *torch.autograd.grad(y.square().sum(), (state["weight"], state["bias"]))

    traced, given, expected = ({k: v.clone() for k, v in module.state_dict().items()} for _ in range(3))
    graph = make_fx(loss, tracing_mode="symbolic")(traced, X)
    assert "bnfast.batch_norm_train" in graph.code
    assert "bnfast.batch_norm_backward" in graph.code
    x = data(5, 4, 3, 2, seed=1)
    assert_close(graph(given, x), loss(expected, x))
    assert given["num_batches_tracked"] == 1
    assert_close(given, expected)


def test_compiled_transform() -> None:
    module = bnfast.BatchNorm1d(2, track_running_stats=False).double()
    x = data(3, 4, 2, dtype=torch.float64)

    def slopes(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda v: module(v).pow(3).sum()))(x)

    assert_close(torch.compile(slopes, fullgraph=True, backend="aot_eager")(x), slopes(x))


def test_empty_statistics_are_a_tensor_of_each_call() -> None:
    """The kernels may return one tensor for all calls that keep none; operators may not."""
    x = data(4, 6)
    (_, first, _), (_, second, _) = (
        torch.ops.bnfast.layer_norm(x, None, None, 1, 1e-5, False) for _ in range(2)
    )
    assert first.numel() == second.numel() == 0
    assert first is not second
    assert not torch._C._is_alias_of(first, second)
