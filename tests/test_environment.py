"""The set-up behind the two commands: what it decides, and in which order it installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import environment
from benchmarks.environment import Step
from tests.__main__ import COVERING, LIBRARIES_TIER, OLDEST_TIER, TRITONS

REQUIREMENTS = (environment.ROOT / "requirements.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("lacking", "torch_here", "decision"),
    [
        ([], (2, 13), "go"),
        (["torch", "bnfast.kernels"], None, "full"),
        (["matplotlib"], (2, 13), "layered"),
        (["bnfast.kernels"], (2, 11), "layered"),
        (["bnfast.kernels"], (2, 10), "full"),
    ],
)
def test_decision(lacking: list[str], torch_here: tuple[int, ...] | None, decision: str) -> None:
    assert environment.decide(lacking, torch_here) == decision


def test_pins_of_a_python_and_a_platform() -> None:
    new, old = (environment.pins(REQUIREMENTS, version, "linux") for version in ((3, 12), (3, 10)))
    assert new.keys() == old.keys()
    assert new["numpy"] == "numpy==2.4.6"
    assert old["numpy"] == "numpy==2.2.6"
    assert "triton" in new
    assert "triton" not in environment.pins(REQUIREMENTS, (3, 12), "darwin")
    assert all("==" in pin for pin in new.values())


def test_every_module_has_a_pin() -> None:
    assert set(environment.TO_TEST.values()) <= environment.pins(REQUIREMENTS, (3, 12), "linux").keys()


def test_torch_is_installed_first_and_alone(tmp_path: Path) -> None:
    found = environment.steps("full", tmp_path, ["torch"], environment.TO_TEST)
    assert found[0].command[-2:] == ("2", "torch==2.15.0")  # "--retries 2", then nothing but torch
    assert "numpy" in " ".join(found[1].command)
    assert "torch" not in " ".join(found[1].command).replace(str(tmp_path), "")
    assert found[2].command[-4:-1] == ("--no-deps", "--no-build-isolation", "-e")
    assert not any(step.optional for step in found)


def test_the_oldest_pair_takes_the_place_of_the_pinned_one() -> None:
    newer, older = environment.pinned("requirements.txt"), environment.pinned("requirements-oldest.txt")
    both = environment.pinned("requirements.txt", "requirements-oldest.txt")
    assert both == newer | older
    assert both["torch"] == older["torch"] != newer["torch"]
    assert older["torch"] == "torch=={}.{}.0".format(*environment.OLDEST_TORCH)
    assert older["triton"] == f"triton=={TRITONS[0]}"
    assert newer["triton"].partition("==")[2] in TRITONS


def test_upon_another_python_only_what_lacks_is_installed(tmp_path: Path) -> None:
    lacking = ["tqdm", "sklearn", environment.OURSELVES]
    found = environment.steps("layered", tmp_path, lacking, environment.TO_BENCHMARK)
    assert found[0].command[-3:] == ("uninstall", "-y", "setuptools")
    assert [part.partition("==")[0] for part in found[1].command[-2:]] == ["tqdm", "scikit-learn"]
    assert [step.optional for step in found] == [True, True, False]  # offline, the rest still runs
    assert len(environment.steps("layered", tmp_path, [environment.OURSELVES], {})) == 2


class Machine:
    """Runs no command, but notes them; the ones whose title starts with a word of `failing` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failing: str) -> None:
        self.titles: list[str] = []
        self.failing = failing
        monkeypatch.setattr(environment, "run", self.run)

    def run(self, step: Step, number: str, log: Path) -> bool:
        self.titles.append(step.title)
        if len(self.titles) == 1:  # the one that makes the environment
            inside = "lib/python{}.{}/site-packages".format(*sys.version_info)
            (log.parent / inside).mkdir(parents=True, exist_ok=True)
            (log.parent / "bin").mkdir(exist_ok=True)
            environment.python_of(log.parent).touch()
        return not step.title.startswith(self.failing or ("never",))


STEPS = [Step("one", ("one",)), Step("two", ("two",), optional=True), Step("three", ("three",))]


def test_a_finished_set_up_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch)
    environment.build(tmp_path / "env", STEPS, ["/below"], "stamp")
    assert machine.titles[1:] == ["one", "two", "three"]
    assert next((tmp_path / "env").rglob("packages_below.pth")).read_text() == "/below\n"
    environment.build(tmp_path / "env", STEPS, ["/below"], "stamp")
    assert len(machine.titles) == 4
    environment.build(tmp_path / "env", STEPS, ["/below"], "another stamp")  # requirements.txt has changed
    assert len(machine.titles) == 8


def test_a_set_up_without_an_optional_step_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch, "two")
    environment.build(tmp_path / "env", STEPS, [], "stamp")
    assert machine.titles[1:] == ["one", "two", "three"]
    assert "going on without" in capsys.readouterr().err
    assert not (tmp_path / "env" / environment.STAMP).exists()  # so the next start tries again


def test_a_set_up_that_fails_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch, "one")
    with pytest.raises(SystemExit) as stopped:
        environment.build(tmp_path / "env", STEPS, [], "stamp")
    assert stopped.value.code == 1
    assert machine.titles[1:] == ["one"]
    assert "Without a network" in capsys.readouterr().err


def test_an_environment_of_somebody_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch)
    (tmp_path / "pyvenv.cfg").write_text("version = 3.5.0\n")
    with pytest.raises(SystemExit):
        environment.build(tmp_path, STEPS, [], "stamp")
    assert machine.titles == []


def test_our_own_environment_of_another_python_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("version = 3.5.0\n")
    (tmp_path / environment.LOG).touch()
    assert "--clear" in environment.venv_step(tmp_path).command


def ensure_with(
    monkeypatch: pytest.MonkeyPatch, lacking: list[str], **variables: str
) -> tuple[list[str] | None, list[Path]]:
    """What `ensure` returns where `lacking` is missing, and which Pythons it restarts in."""
    restarts: list[Path] = []
    monkeypatch.delenv("BNFAST_NO_SETUP", raising=False)
    monkeypatch.delenv(environment.RESTARTED, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "missing", lambda wanted: lacking)
    monkeypatch.setattr(environment, "build", lambda *arguments: None)
    monkeypatch.setattr(environment, "restart", restarts.append)
    return environment.ensure(environment.TO_BENCHMARK), restarts


def test_ensure_goes_on_where_nothing_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ensure_with(monkeypatch, []) == ([], [])


def test_ensure_restarts_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, restarts = ensure_with(monkeypatch, ["tqdm"], BNFAST_VENV=str(tmp_path))
    assert restarts == [environment.python_of(tmp_path)]


def test_one_environment_upon_another_python_serves_both_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first one makes it with what the other needs, too: the second takes it as it is."""
    todo: list[Step] = []
    monkeypatch.delenv("BNFAST_NO_SETUP", raising=False)
    monkeypatch.delenv(environment.RESTARTED, raising=False)
    monkeypatch.setenv("BNFAST_VENV", str(tmp_path))
    monkeypatch.setattr(environment, "missing", lambda wanted: [m for m in ("tqdm", "ruff") if m in wanted])
    monkeypatch.setattr(environment, "torch_version", lambda: environment.OLDEST_TORCH)
    monkeypatch.setattr(environment, "build", lambda folder, steps, *rest: todo.extend(steps))
    monkeypatch.setattr(environment, "restart", lambda python: None)
    environment.ensure(environment.TO_BENCHMARK)
    assert any("tqdm" in step.title and "ruff" in step.title for step in todo)


@pytest.mark.parametrize("variable", ["BNFAST_NO_SETUP", environment.RESTARTED])
def test_ensure_sets_up_no_second_time_nor_against_ones_will(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    assert ensure_with(monkeypatch, ["matplotlib"], **{variable: "1"}) == (["matplotlib"], [])
    with pytest.raises(SystemExit):
        ensure_with(monkeypatch, ["torch"], **{variable: "1"})


def test_another_checkouts_kernels_are_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert environment.importable(environment.OURSELVES)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert not environment.importable(environment.OURSELVES)


def test_the_log_keeps_what_a_step_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    failing = Step("fails", (sys.executable, "-c", "print('the reason'); raise SystemExit(3)"))
    assert not environment.run(failing, "1/1", log)
    assert "the reason" in log.read_text()
    assert "the reason" in capsys.readouterr().err
    assert environment.run(Step("works", (sys.executable, "-c", "")), "1/1", log)


def test_an_old_python_gets_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit):
        environment.ensure()
    assert "Python 3.10 or newer" in capsys.readouterr().err


def test_layered_environments_find_both(tmp_path: Path) -> None:
    """A real one, made offline: it sees the packages below it, its own before them."""
    below = tmp_path / "below" / "site-packages"
    below.mkdir(parents=True)
    (below / "lower.py").write_text("name = 'lower'")
    (below / "both.py").write_text("name = 'lower'")
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    environment.lay_upon(folder, [str(below)])
    own = next(folder.rglob("site-packages"))
    (own / "both.py").write_text("name = 'own'")
    script = "import both, lower; print(both.name, lower.name)"
    done = subprocess.run(
        [str(environment.python_of(folder)), "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["own", "lower"]


def test_no_library_brings_its_own_of_what_is_pinned() -> None:
    assert (
        environment.pinned("requirements-libraries.txt")
        .keys()
        .isdisjoint(environment.pinned("requirements.txt", "requirements-oldest.txt"))
    )


def test_the_files_of_the_tiers_exist() -> None:
    assert all((environment.ROOT / name).exists() for name in (*OLDEST_TIER, *LIBRARIES_TIER, *COVERING))
