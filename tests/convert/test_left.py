"""Modules that bnfast.convert leaves alone, and the reasons that it logs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import bnfast
from tests.support.convertible import attributes
from tests.support.foreign import BatchNormAct2d

pytestmark = pytest.mark.usefixtures("stand_ins")


class Same(nn.BatchNorm2d):
    """A subclass that adds nothing."""


class Doubling(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OfTheSameName(nn.BatchNorm2d):
    """As a library's class that was defined a second time, or somewhere else."""

    __module__, __qualname__ = "timm.layers.norm_act", "BatchNormAct2d"


class SomeNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def having(layer: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def timms(**attributes: Any) -> nn.Module:
    return having(BatchNormAct2d(4, nn.ReLU()), **attributes)


def with_hooked_part() -> nn.Module:
    layer: Any = timms()
    layer.act.register_forward_hook(lambda module, args, y: y + 1)
    return layer


# name: (layer, words of the reason)
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Same(4), r"Same \(a subclass of torch.nn.BatchNorm2d\)"),
    "subclass with a forward": (lambda: Doubling(4), "a subclass of torch.nn.LayerNorm"),
    "same name": (lambda: OfTheSameName(4), "a subclass of torch.nn.BatchNorm2d"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "lazy: convert the model after its first batch"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 4)), "parametrized"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.BatchNorm2d(4)), "its parameters are computed"),
    "pruned": (
        lambda: nn.utils.prune.l1_unstructured(nn.BatchNorm2d(4), "weight", 1), "its parameters are computed"
    ),
    "scripted": (
        lambda: torch.jit.trace(nn.BatchNorm2d(4).eval(), torch.zeros(1, 4, 1, 1)), "compiled by torch.jit"
    ),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), "bnfast has no such layer"),
    "RMSNorm": (lambda: nn.RMSNorm(4), "bnfast has no such layer"),
    "somebody's": (lambda: SomeNorm(), "bnfast has no such layer"),
    "activation": (lambda: having(nn.BatchNorm2d(4), activation="relu"), "attributes of its own: activation"),
    "activation module": (lambda: having(nn.BatchNorm2d(4), activation=nn.ReLU()), "of its own: activation"),
    "forward": (lambda: having(nn.BatchNorm2d(4), forward=abs), "attributes of its own: forward"),
    "unknown activation": (lambda: timms(act=nn.PReLU()), "its activation, PReLU, is not among"),
    "dropout": (lambda: timms(drop=nn.Dropout()), "its dropout, Dropout"),
    "hook on the activation": (with_hooked_part, "hooks on its activation"),
    "fast norm": (lambda: timms(_fast_norm=True), "timm's fast norm"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LEFT)
def test_left_alone_and_listed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bnfast")
    make, words = LEFT[name]
    layer = make()
    model = nn.ModuleDict({"stem": nn.BatchNorm2d(4), "other": layer, "again": layer})
    kind, before = type(layer), attributes(layer)
    bnfast.convert(model)
    assert type(model["stem"]) is bnfast.BatchNorm2d
    assert type(layer) is kind
    assert attributes(layer) == before
    total, left = caplog.messages
    assert total.startswith("convert: 1 layers; 1 torch.nn.modules.batchnorm.BatchNorm2d -> bnfast.modules.")
    assert total.endswith("; 1 left alone")
    assert left.startswith("convert: left alone: 1 ")
    assert left.endswith(": other")
    bnfast.convert(layer)
    assert re.search(f"{words}.*: the model$", caplog.messages[3])


def test_lazy_layers_convert_once_they_are_made() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))
    assert type(bnfast.convert(model)[0]) is bnfast.BatchNorm2d


def test_containers_called_norm_are_no_layers(caplog: pytest.LogCaptureFixture) -> None:
    class ConvNormAct(nn.Sequential):
        pass

    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.convert(ConvNormAct(model, nn.BatchNorm1d(3), bnfast.BatchNorm1d(3)))
    assert [message[-14:] for message in caplog.messages] == ["; 0 left alone"]


def test_subclasses_of_ours_are_left_by_both(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(bnfast.BatchNorm2d):
        pass

    layer = Mine(4)
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.revert(bnfast.convert(layer))
    assert type(layer) is Mine
    assert "Mine (a subclass of bnfast's): the model" in caplog.messages[-1]
