"""What other libraries make of bnfast's layers, where these are installed: Opacus refuses those that mix
samples, replaces them as it does torch.nn's, with their activations, and computes the gradients of each
sample for all others; counters and explainers treat them as torch.nn's. `tests/test_importing.py` has the
ways in which the layers get into their registries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast.modules import plain
from tests.support.convertible import BatchNormAct2d, around, data
from tests.support.layers import BY_NAME

pytestmark = pytest.mark.usefixtures("plain_torch_in_one_thread")

# Opacus


def validator() -> Any:
    return pytest.importorskip("opacus.validators").ModuleValidator


def errors(layer: nn.Module) -> list[tuple[str, str]]:
    return [(type(e).__name__, str(e)) for e in validator().validate(nn.Sequential(layer))]


def fixed(*layers: nn.Module, **options: Any) -> Any:
    model = validator().fix(nn.Sequential(*layers), **options)
    assert not validator().validate(model)
    return model


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
def test_refuses_what_torchs_is_refused_for(kind: str, dims: int) -> None:
    name = f"{kind}{dims}d"
    theirs = getattr(nn, name)(4, affine=True, track_running_stats=True)
    (expected,) = errors(theirs)
    converted = bnfast.convert(copy.deepcopy(theirs))
    made = [getattr(library, name)(4, affine=True, track_running_stats=True) for library in (bnfast, plain)]
    for ours in (*made, converted):
        assert errors(ours) == [expected]
        assert isinstance(fixed(ours)[0], type(fixed(theirs)[0]))
        assert fixed(ours)[0].extra_repr() == fixed(theirs)[0].extra_repr()
    assert type(converted) is getattr(bnfast, name)  # it is still there


@pytest.mark.parametrize("name", ["GroupNorm", "LayerNorm", "InstanceNorm2d", "FrozenBatchNorm2d"])
def test_takes_what_mixes_nothing(name: str) -> None:
    assert not errors(getattr(bnfast, name)(*((2, 4) if name == "GroupNorm" else (4,))))


ACTIVE: dict[str, Callable[[type[nn.Module]], nn.Module]] = {
    "ours": lambda act: bnfast.BatchNorm2d(4, activation=act),
    "reverted": lambda act: bnfast.revert(bnfast.BatchNorm2d(4, activation=act)),
    "timm's": lambda act: bnfast.convert(BatchNormAct2d(4, act())),
    "Batch Renormalization": lambda act: bnfast.BatchRenorm2d(4, activation=act),
}


@pytest.mark.parametrize("options", [{}, {"num_groups": 2}, {"replace_bn_with_in": True}], ids=str)
@pytest.mark.parametrize("name", ACTIVE)
def test_replaced_with_the_activation(name: str, options: dict[str, Any], stand_ins: None) -> None:
    layer, x = ACTIVE[name](nn.SiLU), torch.randn(3, 4, 5, 5)
    assert [kind for kind, _ in errors(layer)] == ["ShouldReplaceModuleError"]
    found = fixed(layer, **options)
    assert not isinstance(found[0], nn.BatchNorm2d)
    assert_close(found(x), nn.functional.silu(fixed(nn.BatchNorm2d(4), **options)(x)))


def test_an_activation_that_cannot_be_kept_raises(stand_ins: None) -> None:
    layer = bnfast.convert(BatchNormAct2d(4, nn.ReLU()))
    layer.act = nn.Softplus()
    with pytest.raises(ValueError, match="Softplus, which BatchNorm2d calls, would be lost.*bnfast.revert"):
        fixed(layer)


class Mine(bnfast.BatchNorm2d):
    """It may do more than its replacement would."""


def test_subclasses_are_refused_and_not_replaced() -> None:
    assert [kind for kind, _ in errors(Mine(4))] == ["ShouldReplaceModuleError"]
    assert type(validator().fix(nn.Sequential(Mine(4)))[0]) is Mine


def test_a_fused_model() -> None:
    """It is replaced as the original one, and private training of it is refused until then."""
    opacus = pytest.importorskip("opacus")
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    ours = bnfast.fuse(copy.deepcopy(theirs))
    assert len(bnfast.fusion_report(ours).fused) == 1
    x = torch.randn(4, 3, 4, 4)
    found, expected = (validator().fix(model) for model in (ours, theirs))
    assert type(found[1]) is nn.GroupNorm
    assert_close(found(x), expected(x))
    arguments: dict[str, Any] = {
        "optimizer": torch.optim.SGD(ours.parameters(), lr=0.1),
        "data_loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2),
    }
    with pytest.raises(Exception, match="BatchNorm cannot support training with differential privacy"):
        opacus.PrivacyEngine().make_private(module=ours, noise_multiplier=1.0, max_grad_norm=1.0, **arguments)


def backward(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    (y * y.detach().cos()).sum().backward()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", ["GroupNorm", "LayerNorm", "InstanceNorm2d"])
def test_gradients_of_each_sample(name: str, activation: str | None, mode: str) -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample.utils")
    options, x = {"affine": True} if "Instance" in name else {}, BY_NAME[name].input(dtype=torch.float64)
    layer, theirs = BY_NAME[name].pair(dtype=torch.float64, **options)
    layer.activation = bnfast.Activation.of(activation)
    rows = []
    for sample in x:
        theirs.zero_grad()
        backward(nn.Sequential(theirs, nn.ReLU() if activation else nn.Identity()), sample[None])
        rows.append([p.grad for p in theirs.parameters()])
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    arguments = {"max_grad_norm": 1.0, "use_ghost_clipping": True} if mode == "ghost" else {}
    backward(grad_sample.prepare_module(layer, mode, loss_reduction="sum", **arguments), x)
    if mode == "ghost":
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected])
        assert_close(torch.stack([p._norm_sample for p in layer.parameters()]), norms)
    else:
        assert_close([p.grad_sample for p in layer.parameters()], expected)


# Counters of operations


def network() -> Any:
    behind = nn.ReLU(), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([5, 6])
    return around(nn.BatchNorm2d(4), *behind).float().eval()


def by_thop(model: nn.Module) -> Any:
    return pytest.importorskip("thop").profile(model, (data().float(),), verbose=False)


def by_ptflops(model: nn.Module) -> Any:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    return count(model, (3, 5, 6), backend="pytorch", as_strings=False, print_per_layer_stat=False)


@pytest.mark.parametrize("count", [by_thop, by_ptflops])
def test_counted_as_torchs(count: Callable[[nn.Module], Any]) -> None:
    expected = count(network())
    assert count(bnfast.convert(network())) == expected
    assert expected[0] > count(network()[0])[0]


# Explanations


def explained(model: nn.Module) -> Tensor:
    captum = pytest.importorskip("captum.attr")
    x, base = data()[:2], data()[1:] * 2
    torch.manual_seed(2)
    whole = nn.Sequential(model.eval(), nn.Flatten(), nn.Linear(120, 2, dtype=torch.float64))
    nn.init.normal_(whole[2].weight)
    found: Tensor = captum.DeepLift(whole).attribute(x, base, target=1).detach()
    difference = (whole(x) - whole(base))[:, 1]  # which is what is explained
    assert difference.abs().min() > 0.1
    assert_close(found.sum((1, 2, 3)), difference)
    return found


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks", "ignore:Input Tensor 0 did not already")
def test_deep_lift(stand_ins: None) -> None:
    """The activation within a layer counts as the one behind it."""
    plain = explained(around(nn.BatchNorm2d(4)))
    assert_close(explained(bnfast.convert(around(nn.BatchNorm2d(4)))), plain)
    expected = explained(around(nn.BatchNorm2d(4), nn.ReLU()))
    assert (expected - plain).abs().max() > 0.1
    frozen = [bnfast.FrozenBatchNorm2d(4, activation="relu") for _ in range(2)]
    layers = [*(make(nn.ReLU) for make in ACTIVE.values()), frozen[0], bnfast.revert(frozen[1])]
    models = [*map(around, layers), bnfast.fuse(around(nn.BatchNorm2d(4), nn.ReLU()))]
    for model in models:
        assert_close(explained(model), expected)
    with pytest.raises(RuntimeError, match="no rule for GroupNorm with an activation of its own"):
        explained(around(bnfast.GroupNorm(2, 4, activation="relu")))


# torch.func


def test_replace_all_batch_norm_modules() -> None:
    model = nn.Sequential(bnfast.BatchNorm2d(2), nn.BatchNorm2d(2)).double()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    torch.func.replace_all_batch_norm_modules_(model)
    for layer in model:
        assert layer.running_mean is None
        assert_close(layer.eval()(x), nn.BatchNorm2d(2, track_running_stats=False).double()(x))
    renorm = nn.Sequential(bnfast.BatchRenorm2d(2))
    torch.func.replace_all_batch_norm_modules_(renorm)
    for training in (True, False):
        with pytest.raises(RuntimeError, match="has lost its running statistics.*bnfast.revert"):
            renorm.train(training)(x.float())


def test_lightnings_way_to_freeze() -> None:
    """Which leaves a BatchNorm training, without its running statistics."""
    finetuning = pytest.importorskip("lightning.pytorch.callbacks").BaseFinetuning
    model = nn.Sequential(bnfast.BatchNorm2d(2), bnfast.BatchRenorm2d(2))
    x, before = torch.randn(3, 2, 2, 2), copy.deepcopy(model.state_dict())
    finetuning.freeze(model, train_bn=False)
    assert_close(model[0](x), nn.BatchNorm2d(2)(x))
    with pytest.raises(RuntimeError, match=r"cannot train .*BaseFinetuning.freeze sets: call eval\(\)"):
        model(x)
    model[1].eval()
    model(x)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    finetuning.make_trainable(model)
    model.train()[1](3 * x)
    assert (model[1].running_var != 1).all()
