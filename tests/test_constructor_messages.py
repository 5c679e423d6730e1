"""Constructors called with arguments that they do not have: the message names the layer and a way out. And
what Batch Renormalization's constructor refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

import bnfast
from bnfast import modules

ARGUMENTS = {name: (2, 8) if name == "GroupNorm" else (8,) for name in modules.__all__}


class Users(bnfast.BatchNorm2d):
    """A subclass that passes its arguments on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(8, **kwargs)


UNEXPECTED = "{layer}() got an unexpected keyword argument '{keyword}': did you mean '{meant}'?"
MEANT = [
    *product(ARGUMENTS, ["act", "activations", "act_layer", "Activation"], ["activation"]),
    ("BatchNorm1d", "epsilon", "eps"),
    ("BatchNorm1d", "track_stats", "track_running_stats"),
    ("GroupNorm", "groups", "num_groups"),
    ("LayerNorm", "normalised_shape", "normalized_shape"),
    ("LayerNorm", "elementwise", "elementwise_affine"),
    ("BatchRenorm2d", "warmup", "warmup_steps"),
]


@pytest.mark.parametrize(("name", "keyword", "meant"), MEANT)
def test_the_layer_is_named_and_an_argument_suggested(name: str, keyword: str, meant: str) -> None:
    with pytest.raises(TypeError) as raised:
        getattr(bnfast, name)(*ARGUMENTS[name], **{keyword: "relu"})
    assert str(raised.value) == UNEXPECTED.format(layer=name, keyword=keyword, meant=meant)
    assert raised.value.__suppress_context__


def renorm(**options: Any) -> Callable[[], object]:
    return lambda: bnfast.BatchRenorm2d(3, **options)


NAN = float("nan")
OTHERS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "where none is near all are listed": (
        lambda: bnfast.GroupNorm(2, 8, momentum=0.1),
        TypeError,
        "'momentum': it takes num_groups, num_channels, eps, .*activation$",
    ),
    "a subclass hears whose arguments they are": (
        lambda: Users(act="relu"),
        TypeError,
        "^" + re.escape(UNEXPECTED.format(layer="BatchNorm2d", keyword="act", meant="activation")),
    ),
    "other errors pass": (lambda: bnfast.BatchNorm2d(8, dtype="nonsense"), TypeError, r"^empty\(\)"),
    "no momentum": (renorm(momentum=None), ValueError, "momentum"),
    "no statistics": (renorm(track_running_stats=False), ValueError, "track_running_stats"),
    "r_max < 1": (renorm(r_max=0.5), ValueError, "r_max"),
    "d_max < 0": (renorm(d_max=-1.0), ValueError, "d_max"),
    "steps out of order": (renorm(warmup_steps=10, r_max_steps=5), ValueError, "0 <= warmup_steps"),
    "warmup of nan": (renorm(warmup_steps=NAN), ValueError, "0 <= warmup_steps"),
    "steps of nan": (renorm(r_max_steps=NAN), ValueError, "0 <= warmup_steps"),
}


@pytest.mark.parametrize(("call", "error", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_other_messages(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_private_class_is_named(name: str) -> None:
    layer = getattr(bnfast, name)
    with pytest.raises(TypeError, match=rf"^{name}\(\) missing a required argument: '(num_|normalized_)\w+'"):
        layer()
    with pytest.raises(TypeError, match=rf"^{name}\(\) too many positional arguments"):
        layer(*range(20))
