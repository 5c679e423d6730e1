"""Every layer in graphs: compiled whole and for all batch sizes, exported and traced to plain aten, scripted
as torch.nn's layer, a leaf to torch.fx. And the operators that graphs hold: torch.library's
checks of their schemas (what is mutated, what aliases), of fake tensors, and of dynamic shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import bnfast
from bnfast import dispatch, functional
from bnfast.checks.cases import FORMATS
from tests.support import layers
from tests.support.families import BF16, FP16, FP32, FP64
from tests.support.layers import (
    BY_NAME,
    CLOSE,
    KINDS,
    NORMS,
    Layer,
    Options,
    assert_same,
    data,
    every_path,
    step,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: what an earlier test left in a cache must not spare this one a recompilation."""
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "_suitable", {}, raising=False)


def operators(graphs: AotEagerAndRecordGraphs) -> list[str]:
    """Of autograd's forward and backward."""
    nodes = [n for graph in (*graphs.fw_graphs, *graphs.bw_graphs) for n in graph.graph.nodes]
    # how an operator that mutates is held
    return [str(n.args[0] if "auto_functionalized" in str(n.target) else n.target) for n in nodes]


SCHEDULE: Options = {"warmup_steps": 0, "r_max_steps": 4, "d_max_steps": 4}
CUMULATIVE = (BY_NAME["BatchNorm2d"], {"momentum": None})  # at which torch.nn's own layer breaks the graph
COMPILED = [(layer, SCHEDULE if "Renorm" in layer.name else layer.tracks or {}) for layer in KINDS]


@every_path
@layers.both_modes
@pytest.mark.parametrize(("layer", "options"), [*COMPILED, CUMULATIVE], ids=str)
def test_compiled_whole(layer: Layer, options: Options, training: bool, path: str) -> None:
    """For several batch sizes: the second recompiles, for all further ones."""
    eager = layer.make(**options).train(training)
    module = copy.deepcopy(eager)
    graphs = AotEagerAndRecordGraphs()
    run = torch.compile(module, fullgraph=True, backend=graphs)
    for n in (3, 5, 2, 7):
        x = data(n, *layer.shape[1:], seed=n, last=layer.keeps_format)
        found, expected = step(module, x, run), step(eager, x)
        assert_same(found, expected)
        assert found["y"].stride() == expected["y"].stride()
    assert len(graphs.graphs) == 2
    # batch_renorm_once, which notes that a batch has been counted, is no kernel
    ours = [name for name in operators(graphs) if "bnfast" in name and "once" not in name]
    assert bool(ours) == any("backward" in name for name in ours) == (path == "kernels")


@every_path
@pytest.mark.parametrize(("layer", "options"), [COMPILED[0], CUMULATIVE, (BY_NAME["LayerNorm"], {})], ids=str)
def test_inductor(layer: Layer, options: Options, path: str) -> None:
    eager = layer.make(**options)
    module = copy.deepcopy(eager)
    run = torch.compile(module, fullgraph=True)
    for n in (3, 5):
        x = data(n, *layer.shape[1:], seed=n, last=layer.keeps_format)
        assert_same(step(module, x, run), step(eager, x), rtol=1e-5, atol=2e-5)


CAPTURED = [
    pytest.param(layer, training, id=f"{layer}-{'train' if training else 'eval'}")
    for layer in KINDS
    # Batch Renormalization is evaluated only where it is exported or traced.
    for training in ((False,) if "Renorm" in layer.name else (True, False))
]


@every_path
@pytest.mark.parametrize(("layer", "training"), CAPTURED)
def test_exported_as_plain_aten(layer: Layer, training: bool, path: str) -> None:
    """An exported program must run where bnfast is not installed."""
    module, x = layer.make(**(layer.tracks or {})).train(training), layer.input()
    expected = copy.deepcopy(module)(x)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(t.startswith("aten.") for t in targets if "sym" not in t and "built-in" not in t), targets
    assert any(layer.aten in t for t in targets)
    assert_close(program.module()(x), expected, **CLOSE)


@every_path
@pytest.mark.parametrize(("layer", "training"), CAPTURED)
def test_traced_by_jit_as_plain_aten(layer: Layer, training: bool, path: str) -> None:
    module, x = layer.make(**(layer.tracks or {})).train(training), layer.input()
    expected = copy.deepcopy(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(module, x, check_trace=False)
    baked = [w for w in caught if w.category is torch.jit.TracerWarning]
    if not layer.name.startswith("Instance"):  # torch.nn's too compares the channels with its own
        # F.batch_norm's own check of the batch size, which torch.nn's layers go through as well
        checks = training or layer.tracks is None
        assert all(checks and w.filename == F.__file__ for w in baked), [str(w) for w in baked]
    operators = {n.kind() for n in traced.inlined_graph.nodes()}
    assert any(layer.aten in name for name in operators)
    assert not any("bnfast" in name for name in operators)
    other = data(5, *layer.shape[1:], seed=1)
    expected(x)  # tracing has run one step
    assert_close(traced(other), expected(other), **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a model"])
@layers.both_modes
@pytest.mark.parametrize("layer", [layer for layer in KINDS if "Renorm" not in layer.name], ids=str)
def test_scripted_as_torchs_layer(layer: Layer, training: bool, alone: bool) -> None:
    module = layer.make(**(layer.tracks or {})).train(training)
    module = module if alone else nn.Sequential(module)
    expected, scripted = copy.deepcopy(module), torch.jit.script(module)
    assert_same(step(scripted, layer.input()), step(expected, layer.input()))


@layers.both_modes
@layers.every_layer
def test_a_leaf_to_fx(layer: Layer, training: bool) -> None:
    """Feature extractors cut a traced model at its layers, so a layer must stay one node."""
    module = nn.Sequential(layer.make(**(layer.tracks or {}))).train(training)
    graph = torch.fx.symbolic_trace(copy.deepcopy(module))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert type(graph.get_submodule("0")) is layer.ours
    assert_same(step(graph, layer.input()), step(module, layer.input()))


@layers.every_layer
def test_fx_does_not_look_into_a_subclass(layer: Layer) -> None:
    class Scaled(layer.ours):  # type: ignore[name-defined, misc]
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(torch.fx.proxy.TraceError, match="Scaled cannot be traced with a forward of its own"):
        torch.fx.symbolic_trace(nn.Sequential(Scaled(*layer.arguments)))


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


MASKED, NOT_MASKED = (2, 8, 4, 4), (2, 5, 3, 3)  # shapes for which relu keeps a mask, and the residual
VARIANTS: dict[str, Any] = {
    "all": {},
    "inference": {"wanted": ""},
    "x alone": {"wanted": "x"},
    "weight alone": {"wanted": "w"},
    "parameters of other dtypes": {"wanted": "wb", "dtypes": (BF16, FP64)},
    "fp64, no bias": {"dtype": FP64, "dtypes": (FP64, None), "wanted": "xw"},
    "fp16, bare": {"dtype": FP16, "last": True, "dtypes": (None, None), "wanted": "x"},
    "bf16": {"dtype": BF16, "last": True},
    "transposed": {"arrange": lambda x: x.transpose(0, 3)},
    "2-D": {"shape": (3, 4)},
    "relu, mask": {"activation": "relu", "shape": MASKED},
    "relu, mask, channels_last": {"activation": "relu", "shape": MASKED, "last": True},
    "relu": {"activation": "relu", "shape": NOT_MASKED},
    "relu, channels_last": {"activation": "relu", "shape": NOT_MASKED, "last": True},
    "silu": {"activation": "silu", "shape": MASKED},
    "silu, channels_last": {"activation": "silu", "shape": NOT_MASKED, "last": True},
}


def run(
    norm: str,
    shape: tuple[int, ...] = (3, 4, 3, 2),
    last: bool = False,
    arrange: Callable[[Tensor], Tensor] = lambda x: x,
    dtype: torch.dtype = FP32,
    dtypes: tuple[torch.dtype | None, ...] = (FP32, FP32),
    wanted: str = "xwb",
    activation: str | None = None,
) -> None:
    """A function, with a residual where an activation follows, and its backward. dtypes: of weight and bias.
    wanted: whose gradients."""
    x = arrange(data(*shape, dtype=dtype, last=last))
    size = x.shape[-1] if norm == "layer" else x.shape[1]
    vectors = [None if kind is None else data(size, seed=5, dtype=kind) for kind in dtypes]
    given = dict(zip("xwb", (x, *vectors), strict=True))
    leaves = [t.requires_grad_() for name, t in given.items() if t is not None and name in wanted]
    residual = None if activation is None else x.detach().cos().requires_grad_()
    y = NORMS[norm](functional, *given.values(), activation=activation, residual=residual)
    if wanted:  # dy is contiguous, whatever y is
        torch.autograd.grad(y, leaves, data(*y.shape, seed=5, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if "instance" not in norm])  # GroupNorm's operators
def test_operators_of_functions(norm: str, variant: str) -> None:
    with Recorder() as recorder:
        run(norm, **VARIANTS[variant])
    assert len(recorder.calls) == (1 if variant == "inference" else 2)
    recorder.check()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchRenorm2d"])
def test_operators_of_layers_that_count_batches(name: str, momentum: float | None) -> None:
    layer = BY_NAME[name]
    module = layer.make()
    module.momentum = momentum
    with Recorder() as recorder:
        step(module, layer.input())
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
    graph = make_fx(loss, tracing_mode="symbolic")(traced, data(3, 4, 3, 2))
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


@layers.both_modes
@layers.both_layouts
@layers.every_layer
def test_fake_tensors(layer: Layer, last: bool, training: bool) -> None:
    """Shapes and strides of a step that never ran."""
    real = step(layer.make(**(layer.tracks or {})).train(training), layer.input(last=last))
    with torch._subclasses.FakeTensorMode():
        module = layer.ours(*layer.arguments, **(layer.tracks or {})).train(training)
        x = torch.empty(layer.shape, memory_format=FORMATS[4] if last else torch.contiguous_format)
        y = module(x.requires_grad_())
        y.backward(torch.empty_like(y))
    assert (y.shape, y.stride()) == (real["y"].shape, real["y"].stride())
    assert (x.grad.shape, x.grad.stride()) == (real["dx"].shape, real["dx"].stride())
    for name, parameter in module.named_parameters():
        assert parameter.grad.shape == real[f"d{name}"].shape
