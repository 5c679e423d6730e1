"""Docstrings of everything public: sections that tools read explain every parameter, and examples run."""

from __future__ import annotations

import doctest
import inspect
import pydoc
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfast
from bnfast import modules
from bnfast.fusing.report import Fused, FusionReport, Skipped

LAYERS = [getattr(bnfast, name) for name in modules.__all__]
FUNCTIONS = [getattr(bnfast.functional, name) for name in bnfast.functional.__all__]
MODELS = [bnfast.convert, bnfast.fuse, bnfast.unfuse, bnfast.revert, bnfast.fusion_report]
PUBLIC = [*LAYERS, *FUNCTIONS, *MODELS, bnfast.Activation]
IMPORTED = {"torch": torch, "nn": nn, "F": F, "bnfast": bnfast}  # by the reader of an example

named = pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)


def section(text: str, title: str) -> str:
    """The lines below `title:`, as far as they are indented. Empty if there is no such section."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)+)", f"{text}\n", re.MULTILINE)
    return found[1] if found else ""


def entries(text: str, title: str) -> list[str]:
    """The names that a section explains."""
    return re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: ", section(text, title), re.MULTILINE)


@named
def test_sections(public: Any) -> None:
    """The arguments are explained in their order."""
    text = inspect.getdoc(public) or ""
    taken = [name for name in inspect.signature(public).parameters if name != "self"]
    assert entries(text, "Args") == taken
    if public is not bnfast.Activation:
        for title in ("Returns", "Raises", "Example"):
            assert section(text, title), f"{title}: is missing"
    if public in LAYERS + FUNCTIONS:
        assert "Error: " in section(text, "Raises")
        assert {"input", "output", "residual"} <= set(re.findall(r"- (\w+)", section(text, "Shape")))
        assert "arXiv" in section(text, "References")
    if public in LAYERS:
        shown = pydoc.render_doc(public, renderer=pydoc.plaintext).partition("Method resolution order")[0]
        assert all(word in shown for word in ("activation", "bias", "residual"))


@pytest.mark.parametrize("record", [Fused, Skipped, FusionReport], ids=lambda record: record.__name__)
def test_fields_of_a_report_are_explained(record: Any) -> None:
    assert entries(inspect.getdoc(record) or "", "Attributes") == list(record._fields)


@pytest.mark.parametrize("family", ["BatchNorm", "BatchRenorm", "InstanceNorm"])
@pytest.mark.parametrize(
    ("n", "of_others"), [(1, "[23]d|H, W|channels_last"), (2, r"[13]d|, L\)|D, H"), (3, r"[12]d|C, H|last\b")]
)
def test_siblings_have_their_own_words(family: str, n: int, of_others: str) -> None:
    assert not re.search(of_others, inspect.getdoc(getattr(bnfast, f"{family}{n}d")) or "")


def test_help_of_the_package_lists_everything_public() -> None:
    public = [*bnfast.__all__, *(f"functional.{function.__name__}" for function in FUNCTIONS)]
    shown = bnfast.__doc__ or ""
    assert not [name for name in public if not re.search(rf"^ +.*{re.escape(name)}\b", shown, re.MULTILINE)]


@named
def test_example_runs(public: Any) -> None:
    torch.manual_seed(0)
    text = inspect.getdoc(public) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(IMPORTED), public.__name__, None, None)
    assert example.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)
