"""What bnfast.convert leaves alone, and what it says of it."""

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
from tests.support.foreign import BatchNormAct2d, GroupNormAct, LayerNorm2d, put_in_place


@pytest.fixture(autouse=True)
def _others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


class Same(nn.BatchNorm2d):
    """A subclass that adds nothing."""


class Doubling(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class SomeNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def attributes(module: nn.Module) -> dict[str, Any]:
    """Copies of all it holds, by the objects' identity where these are mutable."""
    return {
        name: dict(value) if isinstance(value, dict) else id(value) for name, value in vars(module).items()
    }


def with_attribute(name: str, value: Any) -> nn.Module:
    layer = nn.BatchNorm2d(4)
    setattr(layer, name, value)
    return layer


def scripted() -> nn.Module:
    return torch.jit.trace(nn.BatchNorm2d(4).eval(), torch.zeros(1, 4, 1, 1))  # type: ignore[no-any-return]


def pruned() -> nn.Module:
    return torch.nn.utils.prune.l1_unstructured(nn.BatchNorm2d(4), "weight", 1)  # type: ignore[no-any-return]


def with_part(name: str, part: nn.Module) -> nn.Module:
    layer = BatchNormAct2d(4, nn.ReLU())
    setattr(layer, name, part)
    return layer


def of_the_same_name() -> nn.Module:
    """As a library's class that was defined a second time, or somewhere else."""

    class BatchNormAct2d(nn.BatchNorm2d):
        __module__, __qualname__ = "timm.layers.norm_act", "BatchNormAct2d"

    return BatchNormAct2d(4)


def with_hooked_part() -> nn.Module:
    layer = BatchNormAct2d(4, nn.ReLU())
    layer.act.register_forward_hook(lambda module, args, y: y + 1)
    return layer


def with_fast_norm() -> nn.Module:
    layer = GroupNormAct(4, nn.ReLU())
    layer._fast_norm = True
    return layer


# name: (layer, words of the reason)
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Same(4), r"Same \(a subclass of torch.nn.BatchNorm2d\)"),
    "subclass with a forward": (lambda: Doubling(4), "a subclass of torch.nn.LayerNorm"),
    "same name": (of_the_same_name, "a subclass of torch.nn.BatchNorm2d"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "lazy: convert the model after its first batch"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 4)), "parametrized"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.BatchNorm2d(4)), "its parameters are computed"),
    "pruned": (pruned, "its parameters are computed"),
    "scripted": (scripted, "compiled by torch.jit"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), "bnfast has no such layer"),
    "timm's of the channels": (lambda: LayerNorm2d(4), "a subclass of torch.nn.LayerNorm"),
    "RMSNorm": (lambda: nn.RMSNorm(4), "bnfast has no such layer"),
    "somebody's": (lambda: SomeNorm(), "bnfast has no such layer"),
    "activation": (lambda: with_attribute("activation", "relu"), "attributes of its own: activation"),
    "activation module": (lambda: with_attribute("activation", nn.ReLU()), "of its own: activation"),
    "forward": (lambda: with_attribute("forward", lambda x: x), "attributes of its own: forward"),
    "unknown activation": (lambda: BatchNormAct2d(4, nn.PReLU()), "its activation, PReLU, is not among"),
    "dropout": (lambda: with_part("drop", nn.Dropout()), "its dropout, Dropout"),
    "hook on the activation": (with_hooked_part, "hooks on its activation"),
    "fast norm": (with_fast_norm, "timm's fast norm"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LEFT)
def test_left_alone_and_listed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, words = LEFT[name]
    layer = make()
    model = nn.ModuleDict({"stem": nn.BatchNorm2d(4), "other": layer, "again": layer})
    kind, before = type(layer), attributes(layer)
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.convert(model)
    assert type(model["stem"]) is bnfast.BatchNorm2d
    assert type(layer) is kind
    assert attributes(layer) == before
    total, left = (record.getMessage() for record in caplog.records)
    assert total.startswith("convert: 1 layers; 1 torch.nn.modules.batchnorm.BatchNorm2d -> bnfast.modules.")
    assert total.endswith("; 1 left alone")
    assert left.startswith("convert: left alone: 1 ")
    assert left.endswith(": other")
    caplog.clear()
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.convert(layer)
    assert re.search(words, caplog.records[1].getMessage())


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
    assert [r.getMessage()[-14:] for r in caplog.records] == ["; 0 left alone"]
