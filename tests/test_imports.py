"""No module imports another that imports it back, not within a function either."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kernels": "bnfast.kernels", "bnfast": "bnfast", "benchmarks": "benchmarks", "codegen": "codegen"}


def modules() -> dict[str, Path]:
    """The modules of the project by name. bnfast/kernels is a link to kernels, and not followed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if not (folder == "bnfast" and inside.parts[0] == "kernels"):
                name = ".".join([package, *inside.with_suffix("").parts])
                found[name.removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that one imports, except for the packages that it is in."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        start = ""
        if isinstance(node, ast.ImportFrom):
            start = resolve_name("." * node.level + (node.module or ""), package) + "."
        for target in (start + alias.name for alias in node.names):
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and not f"{name}.".startswith(f"{target}."):
                found.add(target)
    return found


def test_there_is_no_import_circle() -> None:
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert graph["bnfast.ops.batch_norm"] >= {"bnfast.ops.op", "bnfast.kernels.records"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
