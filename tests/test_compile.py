"""All that captures graphs: torch.compile whole, for several batch sizes, with momentum=None; make_fx,
opcheck, export and tracing to plain aten, fake tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import bnfast
from bnfast import dispatch

OPERATORS = torch.ops.bnfast
SHAPE = (3, 4, 3, 2)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: what an earlier test left in a cache must not spare this one a recompilation."""
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "_suitable", {}, raising=False)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


def model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), bnfast.BatchNorm2d(4, **options), nn.ReLU())


def step(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = run(x)
    (y * data(*y.shape, seed=9)).sum().backward()
    gradients = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **copy.deepcopy(module.state_dict())}


class Graphs:
    """aot_eager that keeps what it is given: the graphs of autograd's forward and backward."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def keep(inner: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            for node in inner.graph.nodes:
                wrapped = "auto_functionalized" in str(node.target)  # how an operator that mutates is held
                self.operators.append(str(node.args[0] if wrapped else node.target))
            return inner

        self.count += 1
        return aot_autograd(fw_compiler=keep)(graph, inputs)


@every_path
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_whole_graph(momentum: float | None, path: str) -> None:
    """Two training steps and an eval one. torch.nn's own layer breaks the graph at momentum=None."""
    expected, compiled = model(momentum=momentum), model(momentum=momentum)
    graphs = Graphs()
    run = torch.compile(compiled, fullgraph=True, backend=graphs)
    for seed in (1, 2):
        x = data(*SHAPE, seed=seed)
        assert_close(step(compiled, run, x), step(expected, expected, x), **CLOSE)
    names = " ".join(graphs.operators)
    assert ("bnfast.batch_norm_train" in names and "bnfast.batch_norm_backward" in names) == (
        path == "kernels"
    )
    assert ("native_batch_norm" in names) == (path == "torch")
    x = data(*SHAPE, seed=3)
    assert_close(step(compiled.eval(), run, x), step(expected.eval(), expected, x), **CLOSE)
    assert ("bnfast.batch_norm_eval" in " ".join(graphs.operators)) == (path == "kernels")
    assert graphs.count == 2  # training and eval


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_inductor(momentum: float | None) -> None:
    expected, compiled = model(momentum=momentum), model(momentum=momentum)
    run = torch.compile(compiled, fullgraph=True)
    for seed in (1, 2):
        x = data(*SHAPE, seed=seed).contiguous(memory_format=torch.channels_last)
        assert_close(step(compiled, run, x), step(expected, expected, x), **CLOSE)


@every_path
def test_batch_size_is_dynamic(path: str) -> None:
    """The second size recompiles, for all further ones."""
    expected, compiled = model(), model()
    graphs = Graphs()
    run = torch.compile(compiled, fullgraph=True, backend=graphs)
    for n in (3, 5, 2, 7):
        x = data(n, *SHAPE[1:], seed=n)
        assert_close(step(compiled, run, x), step(expected, expected, x), **CLOSE)
    assert graphs.count == 2


def test_compiled_transform() -> None:
    module = bnfast.BatchNorm1d(2, track_running_stats=False).double()
    x = data(3, 4, 2, dtype=torch.float64)

    def slopes(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda v: module(v).pow(3).sum()))(x)

    assert_close(torch.compile(slopes, fullgraph=True, backend="aot_eager")(x), slopes(x))


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
    """Schema (who is mutated, who aliases), fake tensors, and dynamic shapes through AOTAutograd."""
    batches = torch.tensor(3) if cumulative else None
    torch.library.opcheck(OPERATORS.batch_norm_train, (*arguments(*case), batches, cumulative, 0.1, 1e-5))


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
    y, table, _ = OPERATORS.batch_norm_train(x, weight, bias, None, None, None, False, 0.1, 1e-5)
    dy = data(*y.shape, seed=5).to(y.dtype)  # contiguous, whatever y is
    torch.library.opcheck(OPERATORS.batch_norm_backward, (x, dy, table, training, *wanted))


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


@both_modes
def test_export_is_plain_aten(training: bool) -> None:
    """An exported program must run where bnfast is not installed."""
    module, x = model().train(training), data(*SHAPE)
    expected = copy.deepcopy(module)(x)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(t.startswith("aten.") for t in targets if "sym" not in t and "built-in" not in t), targets
    assert any("batch_norm" in t for t in targets)
    assert_close(program.module()(x), expected, **CLOSE)


@both_modes
def test_jit_trace_is_plain_aten(training: bool) -> None:
    module, x = model().train(training), data(*SHAPE)
    expected = copy.deepcopy(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(module, x, check_trace=False)
    baked = [w for w in caught if w.category is torch.jit.TracerWarning]
    # F.batch_norm's own check of the batch size, which torch.nn's layers go through as well
    assert all(training and w.filename == F.__file__ for w in baked), [str(w) for w in baked]
    operators = {n.kind() for n in traced.inlined_graph.nodes()}
    assert "aten::batch_norm" in operators
    assert not any("bnfast" in name for name in operators)
    other = data(5, *SHAPE[1:], seed=1)
    expected(x)  # tracing has run one step
    assert_close(traced(other), expected(other), **CLOSE)


@both_modes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fake_tensors(layout: torch.memory_format, training: bool) -> None:
    """Shapes, types and strides of a step that never ran."""
    with torch._subclasses.FakeTensorMode():
        m = bnfast.BatchNorm2d(4).train(training)
        x = torch.empty(SHAPE).contiguous(memory_format=layout).requires_grad_()
        y = m(x)
        y.backward(torch.empty_like(y))
    assert y.shape == x.grad.shape == SHAPE
    assert y.stride() == x.grad.stride() == x.stride()
    assert m.weight.grad.shape == (4,)
