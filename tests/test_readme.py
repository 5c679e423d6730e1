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
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(example, id=f"{page} {number}")
    for page, text in PAGES.items()
    for number, example in enumerate(EXAMPLE.findall(text), 1)
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
    """As a reader would, in a Python of its own: this one may have Triton's interpreter on."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if importlib.util.find_spec("torchvision") is None:
        variables["PYTHONPATH"] = str(ROOT / "tests" / "support" / "stand_ins")
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_examples_are_found() -> None:
    assert len(EXAMPLES) == sum(text.count("```python") for text in PAGES.values())
    assert any("bnfast.BatchNorm2d" in example for example in EXAMPLE.findall(README))


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str) -> None:
    done = run("-W", "error::DeprecationWarning", "-c", example)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    done = run("-m", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_the_two_commands_are_named() -> None:
    assert {"python3 -m benchmarks ", "python3 -m tests "} <= set(re.findall(r"python3 -m \w+ ", README))


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page} to {target}" for page, target in LINKS])
def test_link_leads_somewhere(page: str, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.exists()
    if anchor:
        assert anchor in anchors(path.read_text(encoding="utf-8"))


def test_readme_links_to_every_page() -> None:
    assert set(PAGES) - {"README.md"} <= {target for page, target in LINKS if page == "README.md"}


def test_readme_says_what_is_measured() -> None:
    """docs/benchmarks.md is made from committed results; README's sentence is written by hand."""
    assert ("not measured yet" in README) == ("Not measured yet" in PAGES["docs/benchmarks.md"])


def test_pages_are_short() -> None:
    assert len(README.splitlines()) <= LINES_OF_README
    for page, text in PAGES.items():
        long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]
        assert not long, f"{page}: lines {long} have more than {COLUMNS} characters"
