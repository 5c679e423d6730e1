"""README, CONTRIBUTING, CHANGELOG and docs/: their examples run, the commands that they name exist, and their
links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
EXAMPLES = [
    (page, example)
    for page, text in PAGES.items()
    for example in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = sorted(
    {command for text in PAGES.values() for command in re.findall(r"python3? -m ([\w.]+(?: \w+)?)", text)}
)
LINKS = [
    (page, target)
    for page, text in PAGES.items()
    for target in re.findall(r"\]\(([^)\s]+)\)", text)
    if "://" not in target
]
LINES_OF_README, COLUMNS = 170, 110


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a reader would, in a process of its own: this one may have Triton's interpreter on."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if importlib.util.find_spec("torchvision") is None:
        variables["PYTHONPATH"] = str(ROOT / "tests" / "support" / "stand_ins")
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_example_runs(page: str, example: str) -> None:
    done = run("-W", "error::DeprecationWarning", "-c", example)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    done = run("-m", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page} to {target}" for page, target in LINKS])
def test_link_leads_somewhere(page: str, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.exists()
    if anchor:
        assert anchor in anchors(path.read_text(encoding="utf-8"))


def test_readme() -> None:
    assert "bnfast.BatchNorm2d" in "".join(example for page, example in EXAMPLES if page == "README.md")
    assert {"python3 -m benchmarks ", "python3 -m tests "} <= set(re.findall(r"python3 -m \w+ ", README))
    assert set(PAGES) - {"README.md"} <= {target for page, target in LINKS if page == "README.md"}
    # docs/benchmarks.md is made from committed results; this sentence is written by hand
    assert ("not measured yet" in README) == ("Not measured yet" in PAGES["docs/benchmarks.md"])
    assert len(README.splitlines()) <= LINES_OF_README


@pytest.mark.parametrize("page", PAGES)
def test_form_of_a_page(page: str) -> None:
    """Every example is found, and no line is long."""
    assert [name for name, _ in EXAMPLES].count(page) == PAGES[page].count("```python")
    long = [number for number, line in enumerate(PAGES[page].splitlines(), 1) if len(line) > COLUMNS]
    assert not long, f"lines {long} have more than {COLUMNS} characters"
