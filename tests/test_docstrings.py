"""Docstrings of everything public: every parameter is explained in sections that tools read; examples run."""

from __future__ import annotations

import doctest
import inspect
import pydoc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfast
from bnfast import modules
from bnfast.fusing.report import Fused, FusionReport, Skipped

LAYERS = [getattr(bnfast, name) for name in modules.__all__]
FUNCTIONS = [
    getattr(bnfast.functional, f"{name}_norm") for name in ("batch", "group", "instance", "layer")
] + [bnfast.functional.batch_renorm]
MODELS = [bnfast.convert, bnfast.fuse, bnfast.unfuse, bnfast.revert, bnfast.fusion_report]
PUBLIC = [*LAYERS, *FUNCTIONS, *MODELS, bnfast.Activation]
EXAMPLES = {"torch": torch, "nn": nn, "F": F, "bnfast": bnfast}  # what a reader has imported

named = pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


def section(text: str, title: str) -> str:
    """The lines below `title:`, as far as they are indented. Empty if there is no such section."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)+)", f"{text}\n", re.MULTILINE)
    return found[1] if found else ""


def entries(text: str, title: str) -> list[str]:
    """The names that a section explains."""
    return re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: ", section(text, title), re.MULTILINE)


def parameters(public: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(public).parameters if name != "self"]


@named
def test_parameters_are_explained_in_their_order(public: Any) -> None:
    assert entries(inspect.getdoc(public) or "", "Args") == parameters(public)


@pytest.mark.parametrize("public", [*LAYERS, *FUNCTIONS], ids=lambda public: public.__name__)
def test_sections(public: Any) -> None:
    text = inspect.getdoc(public) or ""
    for title in ("Args", "Shape", "Returns", "Raises", "Example", "References"):
        assert section(text, title), f"{title}: is missing"
    assert "Error: " in section(text, "Raises")
    assert {"input", "output", "residual"} <= set(re.findall(r"- (\w+)", section(text, "Shape")))
    assert "arXiv" in section(text, "References")


@pytest.mark.parametrize("public", MODELS, ids=lambda public: public.__name__)
def test_sections_of_functions_on_models(public: Any) -> None:
    for title in ("Args", "Returns", "Raises", "Example"):
        assert section(inspect.getdoc(public) or "", title), f"{title}: is missing"


@pytest.mark.parametrize("record", [Fused, Skipped, FusionReport], ids=lambda record: record.__name__)
def test_fields_of_a_report_are_explained(record: Any) -> None:
    assert entries(inspect.getdoc(record) or "", "Attributes") == list(record._fields)


@layers
def test_help_explains_activation_bias_and_residual(layer: type) -> None:
    shown = pydoc.render_doc(layer, renderer=pydoc.plaintext)
    for word in ("activation", "bias", "residual"):
        assert word in shown.partition("Method resolution order")[0]


@pytest.mark.parametrize("family", ["BatchNorm", "BatchRenorm", "InstanceNorm"])
def test_a_family_has_one_explanation(family: str) -> None:
    """The three layers repeat their arguments, so that help() and editors show them for each."""
    texts = [inspect.getdoc(getattr(bnfast, f"{family}{n}d")) or "" for n in (1, 2, 3)]
    assert len({section(text, "Args") for text in texts}) == 1
    assert len({section(text, "Raises") for text in texts}) == 1


def test_help_of_the_package_lists_everything_public() -> None:
    shown = bnfast.__doc__ or ""
    functions = [f"functional.{function.__name__}" for function in FUNCTIONS]
    public = [*bnfast.__all__, *functions]
    assert not [name for name in public if not re.search(rf"^ +.*{re.escape(name)}\b", shown, re.MULTILINE)]


@named
def test_example_runs(public: Any) -> None:
    torch.manual_seed(0)
    text = inspect.getdoc(public) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(EXAMPLES), public.__name__, None, None)
    assert example.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)
