"""No module imports another that imports it back, not within a function either."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# bnfast/kernels is a link, which rglob does not follow
FOLDERS = ("bnfast", "bnfast/kernels", "benchmarks", "codegen")
FILES = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}


def imported(name: str, path: Path) -> set[str]:
    """The modules of the project that one imports, except for the packages that it is in."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = resolve_name("." * node.level + (node.module or ""), package)
            targets += [f"{start}.{alias.name}" for alias in node.names]
    # the target is a module, or a name in one
    found = {target if target in MODULES else target.rpartition(".")[0] for target in targets}
    return {module for module in found & MODULES.keys() if not f"{name}.".startswith(f"{module}.")}


def test_there_is_no_import_circle() -> None:
    graph = {name: imported(name, path) for name, path in MODULES.items()}
    assert graph["bnfast.ops.batch_norm"] >= {"bnfast.ops.op", "bnfast.kernels.records"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
