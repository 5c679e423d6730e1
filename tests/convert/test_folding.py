"""torch's folding of BatchNorm into convolutions, and its quantization: the same modules come out as with
torch.nn's layers, and no activation is lost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support import convertible
from tests.support.convertible import BatchNormAct2d, Leaves, around

pytestmark = [
    pytest.mark.usefixtures("stand_ins", "plain_torch_in_one_thread"),
    pytest.mark.filterwarnings(*(f"ignore::{c}Warning" for c in ("Deprecation", "User", "Future"))),
]


def data(dims: int = 2) -> Tensor:
    return convertible.data(dims).float()


def network(*behind: nn.Module, dims: int = 2, norm: nn.Module | None = None) -> Any:
    """In eval, with torch.nn's layer if no other is given."""
    norm = getattr(nn, f"BatchNorm{dims}d")(4) if norm is None else norm
    return around(norm, *behind, dims=dims, bias=True).float().eval()


def renorm() -> Any:
    return network(norm=bnfast.BatchRenorm2d(4))


def active(name: Any = "relu") -> Any:
    return network(norm=bnfast.BatchNorm2d(4, activation=name))


def linear(name: Any = None) -> Any:
    return nn.Sequential(nn.Linear(3, 4), bnfast.BatchNorm1d(4, activation=name)).eval()


def timms(act: type[nn.Module] = nn.Identity) -> Any:
    return network(norm=BatchNormAct2d(4, act()))


class Adding(nn.Module):
    """A layer that takes a residual."""

    def __init__(self, activation: str | None = None) -> None:
        super().__init__()
        self.conv, self.norm = active(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), residual=x[:, [0, 1, 2, 0]])


def kinds(model: nn.Module) -> list[str]:
    """The names and classes of all modules within a model."""
    return [f"{name}: {type(m).__module__}.{type(m).__name__}" for name, m in model.named_modules() if name]


def ao(part: str = "") -> Any:
    return pytest.importorskip(f"torch.ao.quantization{part}")


def optimized(model: nn.Module, **options: Any) -> Any:
    return pytest.importorskip("torch.fx.experimental.optimization").fuse(model, **options)


def folded(model: Any) -> nn.Module:
    layer, norm, *behind = model
    fusion = nn.utils.fusion
    fold: Any = fusion.fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fusion.fuse_conv_bn_eval
    return nn.Sequential(fold(layer, norm), *behind)


def fused_eagerly(model: nn.Module, training: bool = False) -> Any:
    names = [name for name, module in model.named_children()]
    return (ao().fuse_modules_qat if training else ao().fuse_modules)(model.train(training), [names])


def fused_for_training(model: nn.Module) -> Any:
    return fused_eagerly(model, training=True)


@pytest.mark.parametrize("fold", [optimized, folded, fused_eagerly, fused_for_training])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_folded_as_torchs(dims: int, relu: bool, fold: Callable[[nn.Module], Any]) -> None:
    theirs = network(*([nn.ReLU()] if relu else []), dims=dims)
    model = (bnfast.fuse if fold is optimized else bnfast.convert)(copy.deepcopy(theirs))
    found, expected = fold(model), fold(theirs)
    assert kinds(found) == kinds(expected)
    assert list(found.state_dict()) == list(expected.state_dict())
    assert_close(found(data(dims)), expected(data(dims)))
    assert isinstance(model[1], getattr(bnfast, f"BatchNorm{dims}d"))  # in the model that was given


@pytest.mark.parametrize("fold", [optimized, folded, fused_eagerly])
@pytest.mark.parametrize("make", [linear, renorm, timms])
def test_other_layers_are_folded(make: Callable[[], Any], fold: Callable[[nn.Module], Any]) -> None:
    model, x = bnfast.convert(make()), data(0 if make is linear else 2)
    found = fold(model)
    assert sum("Identity" not in kind for kind in kinds(found)) == 1
    assert_close(found(x), model(x))


# torch.fx's optimizer


class Doubling(bnfast.BatchNorm2d):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input, residual)


def test_optimizer_leaves_what_does_more(caplog: pytest.LogCaptureFixture) -> None:
    """That is a residual, an activation, or a subclass's forward."""
    adding = Adding().eval()
    assert_close(optimized(adding)(data()), adding(data()))
    assert not caplog.records
    activating = nn.Sequential(active("silu"), nn.Conv2d(4, 3, 1), Adding("silu")).eval()
    assert_close(optimized(activating)(data()), activating(data()))
    assert caplog.records[0].levelno == logging.WARNING
    (message,) = caplog.messages
    assert "does not fold 1 of the model's layers (0.1) into what is before them, which" in message
    assert "bnfast.fuse" in message
    assert "bnfast.revert" not in message
    theirs = network(norm=Doubling(4))
    graph = torch.fx.GraphModule(theirs, Leaves().trace(theirs))
    assert_close(optimized(graph, no_trace=True)(data()), theirs(data()))


def test_optimizer_leaves_timms_activation(caplog: pytest.LogCaptureFixture) -> None:
    """It says so once in each call, however many layers there are."""
    alone = BatchNormAct2d(4, nn.ReLU())
    theirs = nn.Sequential(timms(nn.ReLU), nn.Conv2d(4, 3, 1), timms(nn.ReLU), nn.ReLU(), alone).eval()
    for calls in (1, 2):
        assert_close(optimized(bnfast.fuse(copy.deepcopy(theirs)))(data()), theirs(data()))
        assert len(caplog.records) == calls
    assert "does not fold 2 of the model's layers (0.1, 2.1) into what" in caplog.messages[1]
    assert "bnfast.revert(model) gives back" in caplog.messages[1]
    assert "activation=" not in caplog.messages[1]


def test_functions_on_tensors_are_as_they_were() -> None:
    """They check no layer where other code calls them, whatever its variables are called."""
    conv, bn = network()
    expected = nn.utils.fuse_conv_bn_eval(conv, bn)
    tensors = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    bn = bnfast.BatchNorm2d(4, activation="relu")
    weight, bias = nn.utils.fusion.fuse_conv_bn_weights(*tensors)
    assert_close((weight, bias), (expected.weight, expected.bias))


# torch.ao.quantization


def layers() -> nn.Sequential:
    """Layers that graph mode quantizes, behind a convolution and by themselves."""
    return nn.Sequential(
        *network(nn.ReLU()), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4), nn.Hardtanh(), nn.InstanceNorm2d(4), nn.LayerNorm([5, 6]),
    ).eval()  # fmt: skip


def quantized(model: nn.Module, training: bool = False) -> tuple[Any, Any]:
    fx = ao(".quantize_fx")
    mapping = ao().get_default_qat_qconfig_mapping if training else ao().get_default_qconfig_mapping
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
    assert kinds(found) == kinds(expected)
    nodes = [[(node.op, str(node.target)) for node in graph.graph.nodes] for graph in (found, expected)]
    assert nodes[0] == nodes[1]
    assert_close(prepared(data()), theirs_prepared(data()))
    if "x86" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "x86"
        assert_close(found(data()), expected(data()))
    assert kinds(model) == before  # the model that was given


@pytest.mark.parametrize("make", [active, timms])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.Hardswish, nn.SiLU])
def test_graph_mode_sets_a_layers_activation_behind_it(kind: type[nn.Module], make: Any) -> None:
    given = bnfast.convert(make(kind))
    (prepared, found), (theirs_prepared, expected) = quantized(given), quantized(network(kind()))
    assert [node.op for node in found.graph.nodes] == [node.op for node in expected.graph.nodes]
    assert not any("Norm" in kind for kind in kinds(found))
    assert_close(prepared(data()), theirs_prepared(data()))
    assert given[1].activation == bnfast.Activation.of(kind)
    (ours, _), (theirs, _) = (
        quantized(nn.Sequential(conv, norm, act, norm, act).eval())  # which calls a layer two times
        for conv, norm, act in ((*given, nn.Identity()), network(kind()))
    )
    assert_close(ours(data()), theirs(data()))


def test_graph_mode_leaves_a_residual() -> None:
    adding = Adding().eval()
    assert_close(quantized(adding)[0](data()), adding(data()))


def quantized_eagerly(model: Any, *together: list[str]) -> Any:
    model = nn.Sequential(ao().QuantStub(), *model, ao().DeQuantStub()).eval()
    model = ao().fuse_modules(model, [*together]) if together else model
    model.qconfig = ao().get_default_qconfig("x86")
    ao().prepare(model, inplace=True)(data())
    return ao().convert(model)


def test_eager_mode() -> None:
    found, expected = (
        kinds(quantized_eagerly(model, ["1", "2", "3"], ["4", "5"]))
        for model in (bnfast.convert(layers()), layers())
    )
    assert found == expected
    assert sum("nn.quantized" in kind for kind in found) == 7


# What they refuse


LOST = "would lose an activation: BatchNorm2d applies relu itself. Make the layer without activation="
OF_TIMMS = r"fuse_conv_bn_eval would .* applies relu itself\. bnfast.revert\(model\) gives back"
RETRAINED = "would train a BatchNorm in the place of BatchRenorm2d: use bnfast.revert"
REFUSED: list[tuple[Callable[[Any], Any], Callable[[], nn.Module], str]] = [
    (folded, active, f"fuse_conv_bn_eval {LOST}"),
    (folded, lambda: linear("elu"), "fuse_linear_bn_eval would lose an activation: BatchNorm1d applies elu"),
    (folded, lambda: bnfast.fuse(timms(nn.ReLU)), OF_TIMMS),
    (fused_eagerly, active, f"fuse_modules {LOST}"),
    (quantized_eagerly, active, f"quantization.convert {LOST}"),
    (fused_for_training, renorm, f"fuse_modules {RETRAINED}"),
    (lambda model: quantized(model, training=True), renorm, f"prepare_qat_fx {RETRAINED}"),
]


@pytest.mark.parametrize(("fold", "make", "words"), REFUSED)
def test_raises_for_what_would_be_lost(
    fold: Callable[[Any], Any], make: Callable[[], nn.Module], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        fold(make())
