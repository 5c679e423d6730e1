"""torch's folding of BatchNorm into convolutions, and its quantization: the same modules come out as with
torch.nn's layers, and no activation is lost."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support.foreign import BatchNormAct2d, put_in_place

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def _quietly_in_plain_torch(plain_torch_in_one_thread: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, UserWarning, FutureWarning))
        yield


def data(dims: int = 2) -> Tensor:
    return torch.randn(2, 3, *(8, 8, 4)[:dims], generator=torch.Generator().manual_seed(1))


def network(dims: int = 2, *behind: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    """With statistics that are not those of a new layer, in eval."""
    torch.manual_seed(0)
    norm = getattr(nn, f"BatchNorm{dims}d")(4) if norm is None else norm
    model = nn.Sequential(CONVOLUTIONS[dims](3, 4, 3), norm, *behind)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(4) + 0.5)
    return model.eval()


def ours(model: nn.Module) -> nn.Module:
    return bnfast.fuse(copy.deepcopy(model))


def kinds(model: nn.Module) -> list[str]:
    """Of all that has nothing in it, and of how it is put together."""
    return [f"{name}: {type(m).__module__}.{type(m).__name__}" for name, m in model.named_modules() if name]


def graph_of(model: Any) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in model.graph.nodes]


# torch.fx's optimizer


def optimized(model: nn.Module) -> Any:
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    return optimization.fuse(model)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_optimizer_folds(dims: int) -> None:
    theirs = network(dims, nn.ReLU())
    found = optimized(ours(theirs))
    assert kinds(found) == kinds(optimized(theirs))
    assert not any("Norm" in kind for kind in kinds(found))
    assert_close(found(data(dims)), theirs(data(dims)))


def test_optimizer_folds_behind_linear_and_batch_renormalization() -> None:
    theirs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(2, 3)
    assert kinds(optimized(ours(theirs))) == ["0: torch.nn.modules.linear.Linear"]
    assert_close(optimized(ours(theirs))(x), theirs(x))
    renorm = network(norm=bnfast.BatchRenorm2d(4))
    assert len(kinds(optimized(renorm))) == 1
    assert_close(optimized(renorm)(data()), renorm(data()))


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(norm=bnfast.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net[1](self.net[0](x), x[:, :1].expand(-1, 4, -1, -1)[..., 1:-1, 1:-1].contiguous())


class Doubling(bnfast.BatchNorm2d):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input, residual)


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, bnfast.BatchNorm2d) or super().is_leaf_module(m, name)


def test_optimizer_leaves_what_does_more(caplog: pytest.LogCaptureFixture) -> None:
    """A residual, an activation, a forward of somebody's."""
    adding = Adding().eval()
    assert_close(optimized(adding)(data()), adding(data()))
    assert not caplog.records
    activating = network(norm=bnfast.BatchNorm2d(4, activation="silu"))
    assert_close(optimized(activating)(data()), activating(data()))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "does not fold 1 layer (1) into the one before it, which" in record.getMessage()
    assert "bnfast.fuse" in record.getMessage()
    assert "bnfast.revert" not in record.getMessage()
    theirs = network(norm=Doubling(4))
    graph = torch.fx.GraphModule(theirs, Leaves().trace(theirs))
    folded = torch.fx.experimental.optimization.fuse(graph, no_trace=True)
    assert_close(folded(data()), theirs(data()))


def test_optimizer_leaves_timms_activation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so once, however many layers there are, in each call."""
    put_in_place(monkeypatch)
    theirs = nn.Sequential(
        network(norm=BatchNormAct2d(4, nn.ReLU())), nn.Conv2d(4, 3, 1),
        network(norm=BatchNormAct2d(4, nn.ReLU())), nn.ReLU(), BatchNormAct2d(4, nn.ReLU()),
    ).eval()  # fmt: skip
    for calls in (1, 2):
        assert_close(optimized(ours(theirs))(data()), theirs(data()))
        assert len(caplog.records) == calls
    message = caplog.records[1].getMessage()
    assert "does not fold 2 layers (0.1, 2.1) into the ones before them" in message
    assert "bnfast.revert(model) gives back" in message
    assert "activation=" not in message
    bare = network(norm=BatchNormAct2d(4, nn.Identity()))
    assert not any("Norm" in kind for kind in kinds(optimized(ours(bare))))
    assert_close(optimized(ours(bare))(data()), bare(data()))


# torch.nn.utils.fusion


@pytest.mark.parametrize("make", [bnfast.BatchNorm2d, bnfast.BatchRenorm2d])
def test_fuse_conv_bn_eval(make: Any) -> None:
    model = network(norm=make(4))
    assert_close(nn.utils.fusion.fuse_conv_bn_eval(*model)(data()), model(data()))
    for activation in ("relu", ("leaky_relu", 0.1)):
        with pytest.raises(RuntimeError, match="fuse_conv_bn_eval would lose an activation: .*elu itself"):
            nn.utils.fuse_conv_bn_eval(*network(norm=make(4, activation=activation)))


def test_fuse_linear_bn_eval() -> None:
    linear, norm, x = nn.Linear(3, 4).eval(), bnfast.BatchNorm1d(4).eval(), torch.randn(2, 3)
    assert_close(nn.utils.fusion.fuse_linear_bn_eval(linear, norm)(x), norm(linear(x)))
    norm.activation = bnfast.Activation("relu")
    with pytest.raises(RuntimeError, match="fuse_linear_bn_eval would lose an activation"):
        nn.utils.fusion.fuse_linear_bn_eval(linear, norm)


def test_functions_on_tensors_are_as_they_were() -> None:
    """Whatever calls them."""
    conv, norm = network()
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight, bias = nn.utils.fusion.fuse_conv_bn_weights(*tensors)
    expected = nn.utils.fuse_conv_bn_eval(conv, norm)
    assert_close((weight, bias), (expected.weight, expected.bias))


def test_what_raises_names_a_way_out_for_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    conv, norm = ours(network(norm=BatchNormAct2d(4, nn.ReLU())))
    with pytest.raises(RuntimeError, match=r"applies relu itself\. bnfast.revert\(model\) gives back"):
        nn.utils.fusion.fuse_conv_bn_eval(conv, norm)


# torch.ao.quantization


def ao(part: str) -> Any:
    return pytest.importorskip(f"torch.ao.quantization{part}")


def fused_eagerly(model: nn.Module, training: bool = False) -> nn.Module:
    names = [name for name, module in model.named_children()]
    call = ao("").fuse_modules_qat if training else ao("").fuse_modules
    return call(model.train(training), [names])  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "qat"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fuse_modules(dims: int, relu: bool, training: bool) -> None:
    theirs = network(dims, *([nn.ReLU()] if relu else []))
    model = bnfast.convert(copy.deepcopy(theirs))
    before = copy.deepcopy(model)
    found, expected = fused_eagerly(model, training), fused_eagerly(theirs, training)
    assert kinds(found) == kinds(expected)
    assert list(found.state_dict()) == list(expected.state_dict())
    assert_close(found(data(dims)), expected(data(dims)))
    assert isinstance(before[1], getattr(bnfast, f"BatchNorm{dims}d"))
    assert isinstance(model[1], getattr(bnfast, f"BatchNorm{dims}d"))  # in the model that was given


def test_fuse_modules_raises_for_what_it_would_lose() -> None:
    with pytest.raises(RuntimeError, match="fuse_modules would lose an activation: BatchNorm2d applies relu"):
        fused_eagerly(network(norm=bnfast.BatchNorm2d(4, activation="relu")))
    renorm = network(norm=bnfast.BatchRenorm2d(4))
    assert_close(fused_eagerly(renorm)(data()), renorm(data()))
    with pytest.raises(
        RuntimeError, match="fuse_modules would train a BatchNorm .*BatchRenorm2d: use bnfast.revert"
    ):
        fused_eagerly(renorm, training=True)


def layers() -> nn.Sequential:
    """What graph mode quantizes: with a convolution, and by themselves."""
    return nn.Sequential(
        *network(2, nn.ReLU()), *nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4), nn.Hardtanh(), nn.InstanceNorm2d(4), nn.LayerNorm([6, 6]),
    ).eval()  # fmt: skip


def quantized(model: nn.Module, training: bool = False) -> tuple[Any, Any]:
    fx = ao(".quantize_fx")
    mapping = ao("").get_default_qat_qconfig_mapping if training else ao("").get_default_qconfig_mapping
    prepare = fx.prepare_qat_fx if training else fx.prepare_fx
    prepared = prepare(model.train(training), mapping("x86"), (data(),))
    prepared(data())
    return prepared, fx.convert_fx(copy.deepcopy(prepared).eval())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "qat"])
@pytest.mark.parametrize("change", [bnfast.convert, bnfast.fuse])
def test_graph_mode(change: Callable[[nn.Module], nn.Module], training: bool) -> None:
    theirs = layers()
    model = change(copy.deepcopy(theirs))
    before = kinds(model)
    (prepared, found), (theirs_prepared, expected) = quantized(model, training), quantized(theirs, training)
    assert kinds(prepared) == kinds(theirs_prepared)
    assert graph_of(found) == graph_of(expected)
    assert kinds(found) == kinds(expected)
    assert_close(prepared(data()), theirs_prepared(data()))
    if "x86" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "x86"
        assert_close(found(data()), expected(data()))
    assert kinds(model) == before  # the model that was given


@pytest.mark.parametrize("name", ["relu", "hardswish", "silu"])
def test_graph_mode_sets_a_layers_activation_behind_it(name: str) -> None:
    given = network(norm=bnfast.BatchNorm2d(4, activation=name))
    modules = {"relu": nn.ReLU, "hardswish": nn.Hardswish, "silu": nn.SiLU}
    theirs = network(2, modules[name]())
    (prepared, found), (theirs_prepared, expected) = quantized(given), quantized(theirs)
    assert [op for op, _ in graph_of(found)] == [op for op, _ in graph_of(expected)]
    assert not any("Norm" in kind for kind in kinds(found))
    assert_close(prepared(data()), theirs_prepared(data()))
    assert given[1].activation == bnfast.Activation(name)


def test_graph_mode_with_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.conv, self.norm, self.act = layers

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.act(self.norm(self.conv(x)))))

    given = Twice(*network(2, nn.Identity(), norm=bnfast.BatchNorm2d(4, activation="relu"))).eval()
    theirs = Twice(*network(2, nn.ReLU())).eval()
    assert_close(quantized(given)[0](data()), quantized(theirs)[0](data()))


def test_graph_mode_leaves_and_raises() -> None:
    adding = Adding().eval()
    assert_close(quantized(adding)[0](data()), adding(data()))
    with pytest.raises(RuntimeError, match="prepare_qat_fx would train a BatchNorm .*bnfast.revert"):
        quantized(network(norm=bnfast.BatchRenorm2d(4)), training=True)


def test_eager_mode() -> None:
    results = []
    for change in (lambda model: model, bnfast.convert):
        model = change(nn.Sequential(ao("").QuantStub(), *layers(), ao("").DeQuantStub()))
        model = ao("").fuse_modules(model.eval(), [["1", "2", "3"], ["4", "5"]])
        model.qconfig = ao("").get_default_qconfig("x86")
        ao("").prepare(model, inplace=True)
        model(data())
        results.append(ao("").convert(model, inplace=True))
    assert kinds(results[1]) == kinds(results[0])
    assert sum("nn.quantized" in kind for kind in kinds(results[1])) == 7
    activating = nn.Sequential(
        ao("").QuantStub(), *network(norm=bnfast.BatchNorm2d(4, activation="relu"))
    ).eval()
    activating.qconfig = ao("").get_default_qconfig("x86")
    ao("").prepare(activating, inplace=True)(data())
    with pytest.raises(RuntimeError, match="convert would lose an activation"):
        ao("").convert(activating)
