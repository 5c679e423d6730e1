"""Opacus on our layers: it refuses those that mix samples, replaces them as it does torch.nn's, with their
activations, and computes the gradients of each sample for all others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast.modules import plain
from tests.support.foreign import BatchNormAct2d, put_in_place

validators = pytest.importorskip("opacus.validators")
Validator = validators.ModuleValidator


@pytest.fixture(autouse=True)
def _in_plain_torch(plain_torch_in_one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


def errors(layer: nn.Module) -> list[tuple[str, str]]:
    return [(type(e).__name__, str(e)) for e in Validator.validate(nn.Sequential(layer))]


MIXING: dict[str, dict[str, Any]] = {
    f"{kind}{n}d": arguments
    for kind, arguments in (
        ("BatchNorm", {}),
        ("InstanceNorm", {"affine": True, "track_running_stats": True}),
    )
    for n in (1, 2, 3)
}


@pytest.mark.parametrize("name", MIXING)
def test_refuses_what_torchs_is_refused_for(name: str) -> None:
    theirs = getattr(nn, name)(4, **MIXING[name])
    expected = errors(theirs)
    fixed = Validator.fix(nn.Sequential(theirs))[0]
    assert len(expected) == 1
    for ours in (getattr(bnfast, name)(4, **MIXING[name]), bnfast.convert(copy.deepcopy(theirs))):
        assert errors(ours) == expected
        found = Validator.fix(nn.Sequential(ours))[0]
        assert not errors(found)
        assert isinstance(found, type(fixed))
        assert found.extra_repr() == fixed.extra_repr()
        assert type(ours) is getattr(bnfast, name)


@pytest.mark.parametrize("name", ["GroupNorm", "LayerNorm", "InstanceNorm2d", "FrozenBatchNorm2d"])
def test_takes_what_mixes_nothing(name: str) -> None:
    layer = getattr(bnfast, name)(*((2, 4) if name == "GroupNorm" else (4,)))
    assert not errors(layer)


def from_timm(act: nn.Module) -> nn.Module:
    return bnfast.convert(BatchNormAct2d(4, act))


ACTIVATING = {
    "ours": lambda: bnfast.BatchNorm2d(4, activation="silu"),
    "reverted": lambda: bnfast.revert(bnfast.BatchNorm2d(4, activation="silu")),
    "timm's": lambda: from_timm(nn.SiLU()),
    "Batch Renormalization": lambda: bnfast.BatchRenorm2d(4, activation="silu"),
}


@pytest.mark.parametrize("kwargs", [{}, {"num_groups": 2}, {"replace_bn_with_in": True}], ids=str)
@pytest.mark.parametrize("name", ACTIVATING)
def test_replaced_with_the_activation(name: str, kwargs: dict[str, Any]) -> None:
    layer = ACTIVATING[name]()
    assert [kind for kind, _ in errors(layer)] == ["ShouldReplaceModuleError"]
    x = torch.randn(3, 4, 5, 5)
    fixed = Validator.fix(nn.Sequential(layer), **kwargs)
    assert not Validator.validate(fixed)
    assert not isinstance(fixed[0], nn.BatchNorm2d)
    bare = Validator.fix(nn.Sequential(nn.BatchNorm2d(4)), **kwargs)
    assert_close(fixed(x), nn.functional.silu(bare(x)))


def test_what_cannot_be_kept_raises() -> None:
    layer = from_timm(nn.ReLU())
    layer.act = nn.Softplus()
    with pytest.raises(ValueError, match="Softplus, which BatchNorm2d calls, would be lost.*bnfast.revert"):
        Validator.fix(nn.Sequential(layer))


class Mine(bnfast.BatchNorm2d):
    """Made after Opacus was imported."""


def test_subclasses_are_refused_and_not_replaced() -> None:
    """Nobody knows what they do beside."""
    assert [kind for kind, _ in errors(Mine(4))] == ["ShouldReplaceModuleError"]
    assert type(Validator.fix(nn.Sequential(Mine(4)))[0]) is Mine


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())


def test_a_fused_model() -> None:
    theirs = small()
    ours = bnfast.fuse(copy.deepcopy(theirs))
    assert len(bnfast.fusion_report(ours).fused) == 1
    found, expected = (Validator.fix(model) for model in (ours, theirs))
    assert type(found[1]) is nn.GroupNorm
    x = torch.randn(2, 3, 4, 4)
    assert_close(found(x), expected(x))


def test_private_training_of_it_is_refused() -> None:
    opacus = pytest.importorskip("opacus")
    model = bnfast.fuse(small())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3, 4, 4)), batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Exception, match="BatchNorm cannot support training with differential privacy"):
        opacus.PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
        )


PRIVATE: dict[str, Any] = {
    "GroupNorm": lambda lib, **more: lib.GroupNorm(2, 4, **more),
    "LayerNorm": lambda lib, **more: lib.LayerNorm([4, 3], **more),
    "InstanceNorm2d": lambda lib, **more: lib.InstanceNorm2d(4, affine=True, **more),
}


def of_each_sample(layer: nn.Module, x: Tensor, *behind: nn.Module) -> dict[str, Tensor]:
    """The gradients of one sample at a time."""
    rows = []
    for sample in x:
        y = nn.Sequential(layer, *behind)(sample[None])
        rows.append(torch.autograd.grad((y * y.detach().cos()).sum(), list(layer.parameters())))
    return {name: torch.stack(column) for (name, _), column in zip(layer.named_parameters(), zip(*rows))}  # noqa: B905


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", PRIVATE)
def test_gradients_of_each_sample(name: str, activation: str | None, mode: str) -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample.utils")
    x = torch.randn(3, 4, 4, 3, dtype=torch.float64)
    layer = PRIVATE[name](bnfast, activation=activation).double()
    theirs = PRIVATE[name](nn).double()
    with torch.no_grad():
        for a, b in zip(layer.parameters(), theirs.parameters(), strict=True):
            b.copy_(a.copy_(torch.rand_like(a) + 0.5))
    expected = of_each_sample(theirs, x, *([nn.ReLU()] if activation else []))
    arguments = {"max_grad_norm": 1.0, "use_ghost_clipping": True} if mode == "ghost" else {}
    private = grad_sample.prepare_module(layer, mode, loss_reduction="sum", **arguments)
    y = private(x)
    (y * y.detach().cos()).sum().backward()
    if mode == "ghost":
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected.values()]).norm(dim=0)
        found = torch.stack([p._norm_sample for p in layer.parameters()]).norm(dim=0)
        assert_close(found, norms)
        return
    assert_close({key: p.grad_sample for key, p in layer.named_parameters()}, expected)


def test_plain_layers_are_known_too() -> None:
    assert len(errors(plain.BatchNorm1d(4))) == 1
    assert len(errors(plain.InstanceNorm1d(4, affine=True, track_running_stats=True))) == 1
