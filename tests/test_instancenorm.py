"""InstanceNorm, the function and the layers: numbers against fp64 in the interpreter, running statistics,
memory formats, errors and graphs beside torch.nn's. The kernels are GroupNorm's, tested in
test_groupnorm.py."""

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
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import bnfast
from bnfast.functional import instance_norm
from tests.support.alike import same_error
from tests.support.buffers import bit_identical, nan_filled_allocations
from tests.support.group_cases import FORMATS, check, given, random, run
from tests.support.versions import WITHOUT_BIAS

CLOSE = {"rtol": 1e-5, "atol": 3e-5}
SHAPES = {"1d": (3, 4, 9), "2d": (3, 4, 5, 6), "3d": (2, 4, 3, 4, 3)}
PAIRS = {
    "1d": (bnfast.InstanceNorm1d, nn.InstanceNorm1d),
    "2d": (bnfast.InstanceNorm2d, nn.InstanceNorm2d),
    "3d": (bnfast.InstanceNorm3d, nn.InstanceNorm3d),
}
every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
EVERY = pytest.mark.parametrize("dims", PAIRS)
BOTH = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*shape, seed=seed).to(dtype) + 0.5


def pair(dims: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch.nn's) with the same random parameters."""
    made = [kind(*args, **kwargs) for kind in PAIRS[dims]]
    for module in made:
        with torch.no_grad():
            for n, p in enumerate(module.parameters()):
                p.copy_(data(*p.shape, seed=n + 7))
    return made[0], made[1]


def step(module: nn.Module, x: Tensor) -> dict[str, Any]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(data(*y.shape, seed=2, dtype=y.dtype))
    gradients = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **copy.deepcopy(module.state_dict())}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 5, 6), (2, 20, 9), (1, 3, 31, 33), (2, 4, 3, 4, 5)], ids=str)
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    g = given(shape, shape[1], dtype, layout=layout)
    with nan_filled_allocations():
        ours = run(lambda x, _, weight, bias, eps: instance_norm(x, None, None, weight, bias, eps=eps), g)
    check(g, ours)


@every_path
@EVERY
@BOTH
@pytest.mark.parametrize("arguments", [
    {}, {"affine": True}, {"track_running_stats": True, "momentum": 0.3}, {"eps": 0.1},
    {"track_running_stats": True, "momentum": None, "affine": True},
    *({"affine": True, **without} for without in WITHOUT_BIAS),
], ids=str)  # fmt: skip
def test_like_torch(
    arguments: dict[str, Any], dims: str, layout: str, path: str, launches: list[Any]
) -> None:
    """Two steps of training and one of evaluation: results, gradients, statistics, and the memory format that
    torch loses."""
    ours, theirs = pair(dims, 4, **arguments)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    memory_format = FORMATS[len(SHAPES[dims])] if layout == "channels_last" else torch.contiguous_format
    for seed in range(3):
        if seed == 2:
            ours.eval(), theirs.eval()
        x = data(*SHAPES[dims], seed=seed).contiguous(memory_format=memory_format)
        found = step(ours, x)
        assert_close(found, step(theirs, x), **CLOSE)
        assert found["y"].is_contiguous(memory_format=memory_format)
        assert found["dx"].is_contiguous(memory_format=memory_format)
    assert bool(launches) == (path == "kernels")


@every_path
@EVERY
def test_unbatched_and_mismatched(dims: str, path: str) -> None:
    x = data(*SHAPES[dims][1:])
    for arguments in ({}, {"affine": True, "track_running_stats": True}):
        ours, theirs = pair(dims, 4, **arguments)
        assert_close(step(ours, x), step(theirs, x), **CLOSE)
    ours, theirs = pair(dims, 5)
    with pytest.warns(UserWarning, match="does not match num_features"):
        y = ours(x)
    with pytest.warns(UserWarning, match="does not match num_features"):
        assert_close(y, theirs(x), **CLOSE)
    for module in pair(dims, 5, affine=True):
        with pytest.raises(ValueError, match="match num_features"):
            module(x)
    for module in pair(dims, 4):
        with pytest.raises(ValueError, match="expected"):
            module(data(4))


@every_path
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics(dtype: torch.dtype, kind: torch.dtype, path: str) -> None:
    """The samples' average of mean and unbiased variance, also where the variance is far below eps."""
    x = (data(3, 4, 6, 6) * 1e-4).to(dtype)
    mean, variance = torch.full((4,), 0.25, dtype=kind), torch.full((4,), 1e-8, dtype=kind)
    instance_norm(x, mean, variance, momentum=0.75)
    wide = x.double()
    coarse = kind == torch.float16 or (
        path == "torch" and dtype != torch.float32
    )  # there torch's own rounding
    close = {"rtol": 2e-3, "atol": 6e-8} if coarse else {"rtol": 1e-5, "atol": 0.0}
    assert_close(mean.double(), 0.0625 + 0.75 * wide.mean((2, 3)).mean(0), **close)
    if not coarse:  # of which 1e-8 is no number in fp16
        assert_close(variance.double(), 0.25e-8 + 0.75 * wide.var((2, 3)).mean(0), rtol=1e-4, atol=0)


X, M, V = data(*SHAPES["2d"]), data(4, seed=3), data(4, seed=4).square() + 0.1
ERRORS: dict[str, Callable[[Any], Any]] = {
    "one position": lambda f: f(data(2, 4, 1)),
    "2-D": lambda f: f(data(3, 4)),
    "1-D": lambda f: f(data(3)),
    "no statistics": lambda f: f(X, use_input_stats=False),
    "one statistic": lambda f: f(X, M.clone()),
    "one statistic, not used": lambda f: f(X, M.clone(), use_input_stats=False),
    "weight size": lambda f: f(X, weight=data(3)),
    "weight shape": lambda f: f(X, weight=data(4, 1)),
    "statistics' size": lambda f: f(X, data(3), data(3)),
    "statistics' size, used": lambda f: f(X, data(3), data(3), use_input_stats=False),
    "momentum None": lambda f: f(X, M.clone(), V.clone(), momentum=None),
    "use_input_stats 1": lambda f: f(X, use_input_stats=1),
    "eps None": lambda f: f(X, eps=None),
    "statistics with a gradient": lambda f: f(X, M.clone().requires_grad_(), V.clone()),
    "a list": lambda f: f([1.0]),
}
ALLOWED: dict[str, Callable[[Any], Tensor]] = {
    "eps 0": lambda f: f(X, eps=0),
    "eps < 0": lambda f: f(X, eps=-0.01),
    "eps < 0, statistics": lambda f: f(X, M, V + 1, use_input_stats=False, eps=-0.01),
    "momentum 1": lambda f: f(X, M.clone(), V.clone(), momentum=1),
    "no samples": lambda f: f(data(0, 4, 3)),
    "no positions": lambda f: f(data(2, 4, 0)),
    "2-D, statistics": lambda f: f(data(3, 4), M, V, use_input_stats=False),
    "one position, statistics": lambda f: f(data(3, 4, 1), M, V, M, V, use_input_stats=False),
}


@every_path
@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS.keys())
def test_same_errors(call: Callable[[Any], Any], path: str) -> None:
    same_error(lambda: call(instance_norm), lambda: call(F.instance_norm))


@every_path
@pytest.mark.parametrize("call", ALLOWED.values(), ids=ALLOWED.keys())
def test_same_results(call: Callable[[Any], Tensor], path: str) -> None:
    assert_close(call(instance_norm), call(F.instance_norm), equal_nan=True, **CLOSE)


@every_path
def test_a_rejected_batch_leaves_no_trace(path: str) -> None:
    mean, variance = M.clone(), V.clone()
    for x, weight in ((data(2, 4, 1), None), (X, data(3)), (X, data(4).to("meta"))):
        with pytest.raises((ValueError, RuntimeError)):
            instance_norm(x, mean, variance, weight)
        assert bit_identical(mean, M)
        assert bit_identical(variance, V)


@every_path
def test_autocast_keeps_the_dtype(path: str) -> None:
    ours, _ = pair("2d", 4, affine=True, track_running_stats=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(ours, X.bfloat16())
    assert found["y"].dtype == found["dx"].dtype == torch.bfloat16
    assert found["dweight"].dtype == found["running_mean"].dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(layout: Any, launches: list[Any]) -> None:
    x = data(2, 2, 2, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (data(2, seed=n, dtype=torch.float64).requires_grad_() for n in (1, 2))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_norm(x, weight=weight, bias=bias, eps=1e-2)

    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)
    assert launches
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


@every_path
def test_per_sample_gradients(path: str) -> None:
    results = []
    for module in pair("2d", 4, affine=True):
        state = {k: v.detach() for k, v in module.state_dict().items()}

        def loss(state: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
            return (functional_call(module, state, (x[None],)) ** 3).sum()

        results.append(vmap(grad(loss), (None, 0))(state, X))
    assert_close(*results, rtol=1e-4, atol=1e-4)


@every_path
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(training: bool, path: str) -> None:
    torch._dynamo.reset()
    ours, theirs = (m.train(training) for m in pair("2d", 4, affine=True, track_running_stats=True))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        x = data(n, 4, 5, 6).contiguous(memory_format=torch.channels_last)
        y = compiled(x)
        assert y.stride() == x.stride()
        assert_close(y, theirs(x), **CLOSE)
    assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE)


@every_path
def test_graphs_and_copies(path: str) -> None:
    ours, theirs = (m.eval() for m in pair("2d", 4, affine=True, track_running_stats=True))
    exported = torch.export.export(ours, (X,))
    assert not any("bnfast" in str(n.target) for n in exported.graph.nodes)
    assert_close(exported.module()(X), theirs(X), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(torch.jit.trace(ours, X)(X), theirs(X), **CLOSE)
        assert_close(torch.jit.script(nn.Sequential(ours))(X), theirs(X), **CLOSE)
    graph = torch.fx.symbolic_trace(nn.Sequential(ours))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is bnfast.InstanceNorm2d
        assert isinstance(twin, nn.InstanceNorm2d)
        assert_close(step(twin.train(), X), step(copy.deepcopy(theirs).train(), X), **CLOSE)
