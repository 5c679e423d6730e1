"""What other libraries' counters, explainers and freezers make of bnfast's layers. `tests/test_importing.py`
has the ways in which the layers get into their registries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support.convertible import around, data
from tests.support.foreign import BatchNormAct2d

# Counters of operations


def network() -> Any:
    behind = nn.ReLU(), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([5, 6])
    return around(nn.BatchNorm2d(4), *behind).float().eval()


def test_thop() -> None:
    profile, x = pytest.importorskip("thop").profile, data().float()
    expected = profile(network(), (x,), verbose=False)
    assert profile(bnfast.convert(network()), (x,), verbose=False) == expected
    assert expected[0] > profile(network()[0], (x,), verbose=False)[0]


def test_ptflops() -> None:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    arguments: Any = {"backend": "pytorch", "as_strings": False, "print_per_layer_stat": False}
    expected = count(network(), (3, 5, 6), **arguments)
    assert count(bnfast.convert(network()), (3, 5, 6), **arguments) == expected


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
    layers = [bnfast.BatchNorm2d, bnfast.BatchRenorm2d, bnfast.FrozenBatchNorm2d]
    models = [
        change(around(kind(4, activation="relu"))) for kind in layers for change in (copy.copy, bnfast.revert)
    ]
    models.append(bnfast.convert(around(BatchNormAct2d(4, nn.ReLU()))))
    models.append(bnfast.fuse(around(nn.BatchNorm2d(4), nn.ReLU())))
    for model in models:
        assert_close(explained(model), expected)
    with pytest.raises(
        RuntimeError, match="DeepLift has no rule for GroupNorm with an activation of its own"
    ):
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
        with pytest.raises(
            RuntimeError, match="BatchRenorm2d has lost its running statistics.*bnfast.revert"
        ):
            renorm.train(training)(x.float())


def test_lightnings_way_to_freeze() -> None:
    """Which leaves a BatchNorm training, without its running statistics."""
    finetuning = pytest.importorskip("lightning.pytorch.callbacks").BaseFinetuning
    model = nn.Sequential(bnfast.BatchNorm2d(2), bnfast.BatchRenorm2d(2))
    x, before = torch.randn(3, 2, 2, 2), copy.deepcopy(model.state_dict())
    finetuning.freeze(model, train_bn=False)
    assert_close(model[0](x), nn.BatchNorm2d(2)(x))
    with pytest.raises(
        RuntimeError, match=r"BatchRenorm2d cannot train .*BaseFinetuning.freeze sets: call eval\(\)"
    ):
        model(x)
    model[1].eval()
    model(x)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    finetuning.make_trainable(model)
    model.train()[1](3 * x)
    assert (model[1].running_var != 1).all()
