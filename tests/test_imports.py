"""No module imports another that imports it back, be it within a function: files are read in one order."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kernels": "bnfast.kernels", "bnfast": "bnfast", "benchmarks": "benchmarks", "codegen": "codegen"}


def modules() -> dict[str, Path]:
    """The modules of the project by name. bnfast/kernels is a link, which is not followed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if not (folder == "bnfast" and inside.parts[0] == "kernels"):
                parts = [package, *inside.with_suffix("").parts]
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that one imports, its own packages apart."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    asked = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            asked += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            asked += [f"{start}.{alias.name}" for alias in node.names]
    found = set()
    for target in asked:
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
