"""The battery for a GPU: its parts, its time and the commands that it runs; all that shows without a GPU."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import ROOT, __main__, battery, records, session
from benchmarks.records import CANNOT, MEASURED, Record

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def part(name: str, *found: Record | BaseException) -> battery.Part:
    def work(look: session.Session, seconds: float):  # type: ignore[no-untyped-def]
        for each in found:
            if isinstance(each, BaseException):
                raise each
            yield each

    return battery.Part(name, 10, work)


def test_parts_of_the_battery_do_not_stop_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look = session.Session(tmp_path, CPU, ["matplotlib"])
    record = Record("probe", MEASURED, "a", us=1.0, gpu="of its own")
    for each in (
        part("good", record, record), part("broken", record, RuntimeError("it broke")),
        part("absent", battery.NotHere("no such program")),
    ):  # fmt: skip
        battery.run_part(look, each, 100)
    battery.run_part(look, part("late", record), 1)
    states = {name: (state, text.partition(" records")[0]) for name, state, text in look.summary}
    assert states == {
        "good": ("DONE", "2"), "broken": ("FAIL", "1"), "absent": ("NOT RUN", "0"), "late": ("PART", "0"),
    }  # fmt: skip
    assert {p.name: len(records.read(p)) for p in tmp_path.glob("*.csv")} == {"good.csv": 2, "broken.csv": 1}
    found = records.read(tmp_path / "good.csv")
    assert found["versions"].str.startswith("bnfast=").all()
    assert set(found["gpu"]) == {"of its own"}
    assert look.close() == 1


def test_the_battery_fits_its_time_and_needs_a_gpu(tmp_path: Path) -> None:
    assert sum(each.seconds for each in battery.PARTS) <= 540
    assert battery.PARTS[0].name == "correctness"
    options = __main__.parser().parse_args(["gpu", "--device", "cpu", "--out", str(tmp_path)])
    assert battery.run(options, []) == 1


def test_what_is_sanitized_is_there_and_little() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        *battery.SANITIZED,
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    assert 4 <= found.stdout.count("::") <= 20


def raised(look: session.Session, *ended: Record) -> tuple[int, str]:
    """How many were kept, and what `processes` says of them."""
    kept, left = [], iter(ended)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(battery, "process", lambda *command: next(left))
        try:
            for record in battery.processes(look, {each.variant: () for each in ended}, 60):
                kept.append(record)
        except (RuntimeError, TimeoutError) as e:
            return len(kept), f"{type(e).__name__}: {e}"
    return len(kept), ""


def test_every_gpu_test_is_in_the_battery() -> None:
    files = {ROOT / f"tests/{name}.py" for names in battery.TESTS.values() for name in names}
    marked = re.compile(r"mark\.gpu|on_gpu\(")
    assert files == {path for path in ROOT.glob("tests/*/test_*.py") if marked.search(path.read_text())}


def test_a_process_of_the_battery_is_recorded(tmp_path: Path) -> None:
    look = session.Session(tmp_path, CPU, [])
    good = battery.process(look, "good", [sys.executable, "-c", "print('3 passed')"], 60)
    assert (good.status, good.note) == (MEASURED, "exit code 0; 3 passed")
    command = [sys.executable, "-c", "print('1 failed'); raise SystemExit(2)"]
    bad = battery.process(look, "bad", command, 60)
    assert (bad.status, bad.note) == (CANNOT, "exit code 2; 1 failed")
    assert raised(look, good) == (1, "")
    assert raised(look, bad, good) == (2, "RuntimeError: bad: exit code 2; 1 failed")


def alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, request.param)
    yield
    assert signal.signal(signal.SIGINT, before) == request.param


def test_a_process_that_is_late_has_its_last_words(interrupts: None, tmp_path: Path) -> None:
    """And what it started does not outlive it."""
    look = session.Session(tmp_path, CPU, [])
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('2 passed until then')\n"
    )
    late = battery.process(look, "late", [sys.executable, "-c", program], 3)
    assert (late.status, late.note) == (CANNOT, "out of time; exit code 0; 2 passed until then")
    child = (tmp_path / "late.log").read_text().split()[0]
    end = time.monotonic() + 10
    while time.monotonic() < end and alive(int(child)):
        time.sleep(0.05)
    assert not alive(int(child))
    said = "late: out of time; exit code 0; 2 passed until then"
    assert raised(look, late) == (1, f"TimeoutError: {said}")
    failed = dataclasses.replace(late, variant="failed", note="exit code 1; 1 failed")
    assert raised(look, late, failed) == (2, "RuntimeError: failed: exit code 1; 1 failed")


def test_work_without_an_end_is_stopped_and_keeps_what_it_made() -> None:
    def work() -> Iterator[Record]:
        for us in (1.0, 2.0, 3.0):
            time.sleep(0.2)
            yield Record("probe", MEASURED, us=us)

    assert len(list(battery.limited(work(), 60))) == 3
    found = battery.limited(work(), 0.3)
    assert [next(found).us, next(found).us] == [1.0, 2.0]
    with pytest.raises(TimeoutError, match="its time was over"):
        next(found)


def test_parts_after_one_that_lost_the_gpu_run_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def answers_no_more(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def noted(look: session.Session, name: str, command: list[str], seconds: float) -> None:
        commands.append(command)

    look = session.Session(tmp_path, torch.device("cuda", 0), ["matplotlib"])
    monkeypatch.setattr(battery, "begin", lambda *rest: look)
    monkeypatch.setattr(battery, "PARTS", [part("machine"), part("tiles"), part("sanitizer")])
    monkeypatch.setattr(battery.stamp, "columns", lambda device: {})
    monkeypatch.setattr(battery, "process", noted)
    monkeypatch.setattr(torch.cuda, "synchronize", answers_no_more)
    arguments = ["gpu", "--limit", "100"]
    assert battery.run(__main__.parser().parse_args(arguments), ["matplotlib"]) == 1
    assert [name for name, *_ in look.summary] == ["machine", "the GPU", "pictures"]
    (command,) = commands
    asked = __main__.parser().parse_args(command[3:])
    assert (asked.part, asked.device, asked.out) == (["tiles", "sanitizer"], "cuda:0", tmp_path)
    assert 60 <= asked.limit <= 80


def test_parts_share_the_time_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that is asked for alone has all of it; one that is quick leaves its time to the next ones."""
    given: dict[str, float] = {}

    def noted(name: str) -> battery.Part:
        def work(look: session.Session, seconds: float) -> Iterator[Record]:
            given[name] = seconds
            yield Record("probe", MEASURED, name, us=1.0)

        return battery.Part(name, 20 if name == "machine" else 40, work)

    monkeypatch.setattr(battery, "PARTS", tuple(map(noted, ("machine", "tiles", "sanitizer"))))
    monkeypatch.setattr(session.Session, "gpu", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        battery, "begin", lambda options, *rest: session.Session(options.out, CPU, ["matplotlib"])
    )
    arguments = ["gpu", "--out", str(tmp_path), "--limit", str(100 + int(battery.SUMMARY))]
    for asked, seconds in (([], [20, 50, 100]), (["--part", "machine"], [100])):
        given.clear()
        assert battery.run(__main__.parser().parse_args([*arguments, *asked]), ["matplotlib"]) == 0
        assert list(given.values()) == pytest.approx(seconds, abs=2)
