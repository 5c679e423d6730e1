"""Opacus on bnfast's layers: it refuses those that mix samples, replaces them as it does torch.nn's, with
their activations, and computes the gradients of each sample for all others."""

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
from tests.support.foreign import BatchNormAct2d

Validator = pytest.importorskip("opacus.validators").ModuleValidator
pytestmark = pytest.mark.usefixtures("stand_ins", "plain_torch_in_one_thread")


def errors(layer: nn.Module) -> list[tuple[str, str]]:
    return [(type(e).__name__, str(e)) for e in Validator.validate(nn.Sequential(layer))]


def fixed(*layers: nn.Module, **options: Any) -> Any:
    model = Validator.fix(nn.Sequential(*layers), **options)
    assert not Validator.validate(model)
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


ACTIVE: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: bnfast.BatchNorm2d(4, activation="silu"),
    "reverted": lambda: bnfast.revert(bnfast.BatchNorm2d(4, activation="silu")),
    "timm's": lambda: bnfast.convert(BatchNormAct2d(4, nn.SiLU())),
    "Batch Renormalization": lambda: bnfast.BatchRenorm2d(4, activation="silu"),
}


@pytest.mark.parametrize("options", [{}, {"num_groups": 2}, {"replace_bn_with_in": True}], ids=str)
@pytest.mark.parametrize("name", ACTIVE)
def test_replaced_with_the_activation(name: str, options: dict[str, Any]) -> None:
    layer, x = ACTIVE[name](), torch.randn(3, 4, 5, 5)
    assert [kind for kind, _ in errors(layer)] == ["ShouldReplaceModuleError"]
    found = fixed(layer, **options)
    assert not isinstance(found[0], nn.BatchNorm2d)
    assert_close(found(x), nn.functional.silu(fixed(nn.BatchNorm2d(4), **options)(x)))


def test_an_activation_that_cannot_be_kept_raises() -> None:
    layer = bnfast.convert(BatchNormAct2d(4, nn.ReLU()))
    layer.act = nn.Softplus()
    with pytest.raises(ValueError, match="Softplus, which BatchNorm2d calls, would be lost.*bnfast.revert"):
        fixed(layer)


class Mine(bnfast.BatchNorm2d):
    """Made after Opacus was imported."""


def test_subclasses_are_refused_and_not_replaced() -> None:
    """They may do more than their replacement would."""
    assert [kind for kind, _ in errors(Mine(4))] == ["ShouldReplaceModuleError"]
    assert type(Validator.fix(nn.Sequential(Mine(4)))[0]) is Mine


def test_a_fused_model() -> None:
    """It is replaced as the original one, and private training of it is refused until then."""
    opacus = pytest.importorskip("opacus")
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    ours = bnfast.fuse(copy.deepcopy(theirs))
    assert len(bnfast.fusion_report(ours).fused) == 1
    x = torch.randn(4, 3, 4, 4)
    found, expected = (Validator.fix(model) for model in (ours, theirs))
    assert type(found[1]) is nn.GroupNorm
    assert_close(found(x), expected(x))
    arguments: dict[str, Any] = {
        "optimizer": torch.optim.SGD(ours.parameters(), lr=0.1),
        "data_loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2),
    }
    with pytest.raises(Exception, match="BatchNorm cannot support training with differential privacy"):
        opacus.PrivacyEngine().make_private(module=ours, noise_multiplier=1.0, max_grad_norm=1.0, **arguments)


PRIVATE: dict[str, Any] = {
    "GroupNorm": lambda lib, **more: lib.GroupNorm(2, 4, **more),
    "LayerNorm": lambda lib, **more: lib.LayerNorm([4, 3], **more),
    "InstanceNorm2d": lambda lib, **more: lib.InstanceNorm2d(4, affine=True, **more),
}


def backward(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    (y * y.detach().cos()).sum().backward()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", PRIVATE)
def test_gradients_of_each_sample(name: str, activation: str | None, mode: str) -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample.utils")
    x = torch.randn(3, 4, 4, 3, dtype=torch.float64)
    layer, theirs = PRIVATE[name](bnfast, activation=activation).double(), PRIVATE[name](nn).double()
    with torch.no_grad():
        for a, b in zip(layer.parameters(), theirs.parameters(), strict=True):
            b.copy_(a.copy_(torch.rand_like(a) + 0.5))
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
