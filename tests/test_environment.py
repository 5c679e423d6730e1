"""The set-up behind the two commands: what it decides, and in which order it installs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import environment
from tests.__main__ import BUDGETS, EXECUTED, LIBRARIES, OLDEST, PERTURBED, TRITONS, pinned

FILES = ("requirements.txt", "requirements-oldest.txt")


class Machine:
    """Notes commands in place of running them; those with a word of `failing` in them fail. The first one of
    an environment makes its folders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.failing, self.commands = folder, "nothing", list[str]()
        monkeypatch.setattr(subprocess, "call", self.call)
        monkeypatch.setenv("BNFAST_VENV", str(folder))

    def call(self, command: Sequence[str], cwd: Path) -> int:
        self.commands.append(" ".join(command))
        if "venv" in command:
            (self.folder / "lib" / "site-packages").mkdir(parents=True, exist_ok=True)
            (self.folder / "bin").mkdir(exist_ok=True)
            (self.folder / "bin" / "python").touch()
        return int(self.failing in self.commands[-1])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    for name in ("BNFAST_NO_SETUP", environment.RESTARTED):
        monkeypatch.delenv(name, raising=False)
    return Machine(monkeypatch, tmp_path / "env")


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def execve(python: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        assert command == [python, *sys.orig_argv[1:]]
        assert variables[environment.RESTARTED] == python
        found.append(python)

    monkeypatch.setattr(os, "execve", execve)
    return found


# what is pinned


def test_every_module_has_a_pin_for_each_python() -> None:
    found = environment.pins("requirements.txt")
    assert set(environment.TO_TEST.values()) | {"setuptools", "wheel"} <= found.keys()
    for python in ("3.10", "3.12"):
        for name, lines in found.items():
            requirements = [Requirement(line) for line in lines]
            given = {"python_version": python, "platform_system": "Linux"}
            (own,) = (each for each in requirements if each.marker is None or each.marker.evaluate(given))
            assert own.name == name
            assert str(own.specifier).startswith("==")


def test_the_oldest_pair_takes_the_place_of_the_pinned_one() -> None:
    """And no library brings its own of what is pinned."""
    newer, older = (environment.pins(name) for name in FILES)
    both = environment.pins(*FILES)
    assert both == newer | older
    assert both["torch"] == older["torch"] != newer["torch"]
    assert pinned("torch", FILES[1]) == "{}.{}.0".format(*environment.OLDEST_TORCH)
    assert pinned("triton", FILES[1]) == TRITONS[0]
    assert pinned("triton", FILES[0]) in TRITONS
    assert both.keys().isdisjoint(environment.pins("requirements-libraries.txt"))


def test_the_files_of_the_gates_exist() -> None:
    named = [
        each
        for gate in (BUDGETS, EXECUTED, LIBRARIES, OLDEST, *PERTURBED)
        for each in gate.selection
        if "tests/" in each
    ]
    assert len(named) > 20
    assert all((environment.ROOT / name).exists() for name in named)


# how an environment is made


def test_torch_is_installed_first_and_alone(machine: Machine) -> None:
    assert environment.separate(machine.folder, FILES[:1]) == machine.folder / "bin" / "python"
    _, torch, rest, itself = machine.commands
    assert torch.endswith(f"--retries 2 torch=={pinned('torch', FILES[0])}")
    assert "numpy" in rest
    assert " torch=" not in rest
    assert "--no-deps --no-build-isolation -e" in itself


def test_upon_another_python_only_what_lacks_is_installed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network, what runs without it still runs, and the next start tries again."""
    monkeypatch.setattr(environment, "missing", lambda wanted: ["tqdm", "sklearn", environment.OURSELVES])
    machine.failing = "tqdm"
    for times in (1, 2):
        environment.completed(machine.folder)
        uncover, added, itself = machine.commands[-3:]
        assert len(machine.commands) == 4 * times
        assert uncover.endswith("uninstall -y setuptools")
        lines = [environment.pins("requirements.txt")[name][0] for name in ("tqdm", "scikit-learn")]
        assert all(line in added for line in lines)
        assert "-e" in itself.split()
        assert "going on without" in capsys.readouterr().err
    machine.failing = "nothing"
    for _ in range(2):
        environment.completed(machine.folder)
    assert len(machine.commands) == 4 * 3
    monkeypatch.setattr(environment, "missing", lambda wanted: [environment.OURSELVES])
    environment.completed(machine.folder)
    assert len(machine.commands) == 4 * 3 + 3


def test_a_set_up_that_fails_says_what_to_do(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.failing = "triton==1"
    with pytest.raises(SystemExit) as stopped:
        environment.layered(machine.folder, ["triton==1"])
    assert stopped.value.code == 1
    assert "triton==1" in machine.commands[-1]
    assert "Without a network" in capsys.readouterr().err


def test_an_environment_of_somebody_else_is_left_alone_and_an_own_one_of_another_python_emptied(
    machine: Machine,
) -> None:
    machine.folder.mkdir()
    (machine.folder / "pyvenv.cfg").touch()
    with pytest.raises(SystemExit):
        environment.layered(machine.folder, [])
    assert machine.commands == []
    (machine.folder / environment.STAMP).write_text("3.5 finished")
    environment.layered(machine.folder, [])
    assert f"-m venv --clear {machine.folder}" in machine.commands[0]


def test_layered_environments_find_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, made offline: it sees the packages below it, its own before them."""
    folder, below = tmp_path / "env", tmp_path / "below" / "site-packages"
    below.mkdir(parents=True)
    (below / "lower.py").write_text("name = 'lower'")
    (below / "both.py").write_text("name = 'lower'")
    call = subprocess.call
    monkeypatch.setattr(
        subprocess, "call", lambda command, cwd: "pip" not in command and call(command, cwd=cwd)
    )
    python = environment.build(folder, [], [str(below)])
    (next(folder.rglob("site-packages")) / "both.py").write_text("name = 'own'")
    script = "import both, lower; print(both.name, lower.name)"
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["own", "lower"]


# what `ensure` does


@pytest.mark.parametrize(("torch", "torch_is_installed"), [("2.10.3", True), ("2.11.0", False), (None, True)])
def test_both_commands_share_an_environment(
    torch: str | None, torch_is_installed: bool, machine: Machine, restarts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first one makes it with what the other needs, too: the second takes it as it is."""

    def version(name: str) -> str:
        if torch is None:
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return torch

    monkeypatch.setattr(environment, "missing", lambda wanted: [m for m in ("tqdm", "ruff") if m in wanted])
    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    for wanted in (environment.TO_BENCHMARK, environment.TO_TEST):
        environment.ensure(wanted)
        assert any("tqdm==" in command and "ruff==" in command for command in machine.commands)
        assert any(" torch==" in command for command in machine.commands) == torch_is_installed
        assert len(machine.commands) == 4
    assert restarts == [str(machine.folder / "bin" / "python")] * 2


@pytest.mark.parametrize("variable", ["BNFAST_NO_SETUP", environment.RESTARTED])
@pytest.mark.parametrize(("lacking", "vital"), [([], False), (["matplotlib"], False), (["torch"], True)])
def test_ensure_sets_up_no_second_time_nor_where_it_is_forbidden(
    lacking: list[str], vital: bool, variable: str, machine: Machine, restarts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nor where nothing lacks."""
    if lacking:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(environment, "missing", lambda wanted: lacking)
    if vital:
        with pytest.raises(SystemExit):
            environment.ensure()
    else:
        assert environment.ensure() == lacking
    assert restarts == machine.commands == []


def test_another_checkouts_kernels_are_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert environment.missing({"sys": "sys"}) == []
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.missing({"nobody.has.this": ""}) == ["nobody.has.this", environment.OURSELVES]


def test_an_old_python_gets_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit):
        environment.ensure()
    assert "Python 3.10 or newer" in capsys.readouterr().err
