"""GroupNorm, the function and the layer, beside torch.nn's: arguments, errors, derivatives, graphs, and what
makes it a drop-in. The kernels' numbers are in test_groupnorm.py."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

import bnfast
from bnfast import exact
from bnfast.functional import group_norm
from bnfast.reference import groupnorm as reference
from tests.support import kernel_calls
from tests.support.alike import same_error
from tests.support.group_cases import given, random
from tests.support.versions import WITHOUT_BIAS

OPERATORS = torch.ops.bnfast
CLOSE = {"rtol": 1e-5, "atol": 3e-5}
SHAPE = (3, 6, 4, 5)
every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BOTH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*shape, seed=seed).to(dtype) + 0.5


def pair(*args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch.nn's) with the same random parameters."""
    made = bnfast.GroupNorm(*args, **kwargs), nn.GroupNorm(*args, **kwargs)
    for module in made:
        with torch.no_grad():
            for n, p in enumerate(module.parameters()):
                p.copy_(data(*p.shape, seed=n + 7))
    return made


def step(module: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor | None]:
    x = x.detach().clone().requires_grad_()
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    for p in parameters:
        p.grad = None
    y = module(x)
    y.backward(data(*y.shape, seed=2, dtype=y.dtype))
    gradients = {f"d{n}": p.grad for n, p in enumerate(parameters)}
    return {"y": y.detach(), "dx": x.grad, **gradients}


@every_path
@BOTH
@pytest.mark.parametrize("arguments", [
    {}, {"eps": 0.1}, {"affine": False}, {"dtype": torch.float64, "device": "cpu"}, *WITHOUT_BIAS,
], ids=str)  # fmt: skip
def test_trains_like_torch(arguments: dict[str, Any], layout: Any, path: str, launches: list[Any]) -> None:
    ours, theirs = pair(3, 6, **arguments)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = data(*SHAPE, dtype=arguments.get("dtype", torch.float32)).contiguous(memory_format=layout)
    found = step(ours, x)
    assert_close(found, step(theirs, x), **CLOSE)
    assert found["y"].is_contiguous(memory_format=layout)  # type: ignore[union-attr]
    assert found["dx"].is_contiguous(memory_format=layout)  # type: ignore[union-attr]
    assert bool(launches) == (path == "kernels")
    assert_close(ours.eval()(x), theirs.eval()(x), **CLOSE)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_checkpoints(clone: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = pair(3, 6)
    twin, fresh = clone(ours), bnfast.GroupNorm(3, 6)
    fresh.load_state_dict(theirs.state_dict())
    expected = step(theirs, data(*SHAPE))
    for module in (twin, fresh):
        assert type(module) is bnfast.GroupNorm
        assert isinstance(module, nn.GroupNorm)
        assert_close(step(module, data(*SHAPE)), expected, **CLOSE)


X = data(*SHAPE)
ERRORS: dict[str, Callable[[Any], Any]] = {
    "C % G": lambda f: f(X, 4),
    "G 0": lambda f: f(X, 0),
    "G -2": lambda f: f(X, -2),
    "G float": lambda f: f(X, 2.0),
    "G bool": lambda f: f(X, True),
    "1-D": lambda f: f(data(4), 2),
    "one value a group": lambda f: f(data(1, 4), 4),
    "one position": lambda f: f(data(1, 2, 1, 1), 2),
    "weight size": lambda f: f(X, 2, data(5)),
    "weight shape": lambda f: f(X, 2, data(6, 1)),
    "bias size": lambda f: f(X, 2, data(6), data(7)),
    "another device": lambda f: f(X, 2, data(6).to("meta")),
    "integers": lambda f: f(X.int(), 2),
    "eps str": lambda f: f(X, 2, eps="small"),
    "eps None": lambda f: f(X, 2, eps=None),
    "a list": lambda f: f([1.0, 2.0], 2),
    "weight a list": lambda f: f(X, 2, [1.0] * 6),
}
ALLOWED: dict[str, Callable[[Any], Tensor]] = {
    "eps < 0": lambda f: f(data(2, 4, 9, 9) * 3, 2, eps=-0.5),
    "eps 0": lambda f: f(X, 2, eps=0),
    "eps a tensor": lambda f: f(X, 2, eps=torch.tensor(0.1)),
    "one value a group, two samples": lambda f: f(data(2, 4), 4),
    "no samples": lambda f: f(data(0, 4, 3), 2),
    "6-D": lambda f: f(data(2, 4, 1, 2, 1, 2), 2),
    "2-D": lambda f: f(data(5, 6), 3),
    "strided weight": lambda f: f(X, 2, data(12)[::2]),
}


@every_path
@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS.keys())
def test_same_errors(call: Callable[[Any], Any], path: str) -> None:
    same_error(lambda: call(group_norm), lambda: call(F.group_norm))


@every_path
@pytest.mark.parametrize("call", ALLOWED.values(), ids=ALLOWED.keys())
def test_same_results(call: Callable[[Any], Tensor], path: str) -> None:
    assert_close(call(group_norm), call(F.group_norm), **CLOSE)


@every_path
@pytest.mark.parametrize("shape", [(2, 4, 0), (2, 0, 3)], ids=["no positions", "no channels"])
def test_samples_without_values(shape: tuple[int, ...], path: str) -> None:
    """Since torch 2.14 an error, before an empty result."""
    try:
        expected = F.group_norm(data(*shape), 2)
    except RuntimeError:
        same_error(lambda: group_norm(data(*shape), 2), lambda: F.group_norm(data(*shape), 2))
    else:
        assert_close(group_norm(data(*shape), 2), expected)


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype(dtype: torch.dtype, path: str) -> None:
    ours, _ = pair(3, 6)
    with torch.autocast("cpu", dtype=dtype):
        found = step(ours, data(*SHAPE).to(dtype))
    assert found["y"].dtype == found["dx"].dtype == dtype  # type: ignore[union-attr]
    assert found["d0"].dtype == torch.float32  # type: ignore[union-attr]


def test_reference() -> None:
    """The formulas, and the judgement, beside torch's in fp64."""
    g = given((3, 6, 4, 5), 3, torch.float64, layout="channels_last")
    x, weight, bias = (t.clone().requires_grad_() for t in (g.x, g.weight, g.bias))  # type: ignore[union-attr]
    y = F.group_norm(x, 3, weight, bias)
    expected = torch.autograd.grad(y, (x, weight, bias), g.dy)
    found = reference.group_norm_backward(g.dy, g.x, g.weight, 3, 1e-5)
    assert_close(reference.group_norm(g.x, g.weight, g.bias, 3, 1e-5), y)
    assert_close(found, expected)
    assert found[0].stride() == g.x.stride()
    values = [v for v, _ in exact.group_norm(g.x, g.dy, 3, g.weight, g.bias, 1e-5).values()]
    assert_close(values, [y.detach(), *expected])


@BOTH
@pytest.mark.parametrize("affine", [0, 1, 2])
def test_gradcheck(affine: int, layout: Any, launches: list[Any]) -> None:
    x = data(2, 4, 2, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    parameters = [data(4, seed=n, dtype=torch.float64).requires_grad_() for n in range(affine)]

    def function(x: Tensor, *p: Tensor) -> Tensor:
        return group_norm(x, 2, *p, eps=1e-3)

    options = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(function, (x, *parameters), **options)
    assert launches
    assert torch.autograd.gradgradcheck(function, (x, *parameters), **options)


@every_path
def test_transforms(path: str, launches: list[Any]) -> None:
    """Per-sample gradients and forward mode, in plain torch."""
    ours, theirs = pair(3, 6)

    def per_sample(module: nn.Module) -> Any:
        state = {k: v.detach() for k, v in module.state_dict().items()}

        def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return (functional_call(module, state, (x[None],)) ** 3).sum()

        return vmap(grad(loss), (None, 0))(state, data(*SHAPE))

    assert_close(per_sample(ours), per_sample(theirs), rtol=1e-4, atol=1e-4)
    tangent = data(*SHAPE, seed=5)
    assert_close(jvp(ours, (X,), (tangent,)), jvp(theirs, (X,), (tangent,)), **CLOSE)
    assert not launches


@every_path
@BOTH
def test_compile(layout: Any, path: str) -> None:
    torch._dynamo.reset()
    ours, theirs = pair(3, 6)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        x = data(n, *SHAPE[1:]).contiguous(memory_format=layout)
        x = x.requires_grad_()
        y, z = compiled(x), theirs(x)
        assert y.stride() == x.stride()
        assert_close(y, z, **CLOSE)
        leaves = (x, *theirs.parameters())
        found = torch.autograd.grad(y, (x, *ours.parameters()), torch.ones_like(y).cumsum(1))
        assert_close(found, torch.autograd.grad(z, leaves, torch.ones_like(z).cumsum(1)), **CLOSE)


OPCHECK = {
    "contiguous": ("contiguous", "wb"),
    "channels_last": ("channels_last", "wb"),
    "bare": ("contiguous", ""),
}


@pytest.mark.parametrize(("layout", "affine"), OPCHECK.values(), ids=OPCHECK.keys())
def test_opcheck(layout: str, affine: str) -> None:
    g = given((2, 6, 3, 4), 3, layout=layout, affine=affine)
    torch.library.opcheck(OPERATORS.group_norm_forward, (g.x, 3, g.weight, g.bias, 1e-5))
    _, table, _ = OPERATORS.group_norm_forward(g.x, 3, g.weight, g.bias, 1e-5)
    for wanted in ((True, torch.float32, torch.float32), (True, None, None), (False, None, torch.bfloat16)):
        torch.library.opcheck(OPERATORS.group_norm_backward, (g.x, g.dy, table, g.weight, 3, *wanted))


@every_path
def test_graphs_without_operators(path: str) -> None:
    """Exported and traced graphs hold aten only; fx has a leaf; scripting takes torch.nn's layer."""
    ours, theirs = pair(3, 6)
    exported = torch.export.export(ours, (X,))
    assert not any("bnfast" in str(n.target) for n in exported.graph.nodes)
    assert_close(exported.module()(X), theirs(X), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(torch.jit.trace(ours, X)(X), theirs(X), **CLOSE)
        assert_close(torch.jit.script(nn.Sequential(ours))(X), theirs(X), **CLOSE)
    graph = torch.fx.symbolic_trace(nn.Sequential(ours))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_close(graph(X), theirs(X), **CLOSE)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_too_large_goes_to_torch(direction: str) -> None:
    ours, theirs = pair(3, 6)
    with kernel_calls.refusing("group", direction):
        found = step(ours, X)
    assert_close(found, step(theirs, X), **CLOSE)
