"""Constructors called with arguments that they have not: the message names the layer and a way out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bnfast
from bnfast import modules

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    name: (2, 8) if name == "GroupNorm" else (8,) for name in modules.__all__
}
all_layers = pytest.mark.parametrize("name", modules.__all__)


class Users(bnfast.BatchNorm2d):
    """A subclass that passes its arguments on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(8, **kwargs)


@all_layers
@pytest.mark.parametrize("keyword", ["act", "activations", "act_layer", "Activation"])
def test_the_layer_is_named_and_the_argument_suggested(name: str, keyword: str) -> None:
    with pytest.raises(TypeError) as raised:
        getattr(bnfast, name)(*ARGUMENTS[name], **{keyword: "relu"})
    assert str(raised.value) == (
        f"{name}() got an unexpected keyword argument '{keyword}': did you mean 'activation'?"
    )
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("layer", "keywords", "suggested"),
    [
        (bnfast.BatchNorm1d, {"epsilon": 1e-3}, "eps"),
        (bnfast.BatchNorm1d, {"track_stats": True}, "track_running_stats"),
        (bnfast.GroupNorm, {"groups": 1}, "num_groups"),
        (bnfast.LayerNorm, {"normalised_shape": 8}, "normalized_shape"),
        (bnfast.LayerNorm, {"elementwise": True}, "elementwise_affine"),
        (bnfast.BatchRenorm2d, {"warmup": 5}, "warmup_steps"),
    ],
)
def test_other_arguments_are_suggested(layer: Any, keywords: dict[str, Any], suggested: str) -> None:
    with pytest.raises(TypeError, match=f"^{layer.__name__}.*: did you mean '{suggested}'\\?$"):
        layer(**keywords)


def test_where_none_is_near_all_are_listed() -> None:
    with pytest.raises(TypeError, match="'momentum': it takes num_groups, num_channels, eps, .*activation$"):
        bnfast.GroupNorm(2, 8, momentum=0.1)  # type: ignore[call-arg]


@all_layers
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer(), r"missing a required argument: '(num_|normalized_)\w+'"),
        (lambda layer: layer(*range(20)), "too many positional arguments"),
    ],
    ids=["too few", "too many"],
)
def test_no_private_class_is_named(call: Callable[[Any], Any], words: str, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\) {words}"):
        call(getattr(bnfast, name))


def test_a_subclass_hears_whose_arguments_they_are() -> None:
    with pytest.raises(TypeError, match=r"^BatchNorm2d\(\) .*'act': did you mean 'activation'"):
        Users(act="relu")


def test_other_errors_pass_through() -> None:
    with pytest.raises(TypeError, match="^empty\\(\\)"):
        bnfast.BatchNorm2d(8, dtype="nonsense")  # type: ignore[arg-type]


@all_layers
def test_signatures_are_what_they_were(name: str) -> None:
    parameters = inspect.signature(getattr(bnfast, name)).parameters
    assert "activation" in parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert isinstance(getattr(bnfast, name)(*ARGUMENTS[name], dtype=torch.float64), torch.nn.Module)
