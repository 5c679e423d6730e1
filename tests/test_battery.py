"""The battery for a GPU: its parts, its time and the commands that it runs; all that shows without a GPU."""

from __future__ import annotations

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import ROOT, __main__, battery, measure, records, session
from benchmarks.battery import LATE, Part
from benchmarks.records import CANNOT, MEASURED, Record

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GOOD = Record("probe", MEASURED, "good", us=1.0, note="exit code 0; 3 passed")
BAD = Record("probe", CANNOT, "bad", note="exit code 2; 1 failed")
SLOW = Record("probe", CANNOT, "slow", note=f"{LATE}exit code 1; 2 passed until then")


def wrong(variant: str) -> Record:
    return dataclasses.replace(GOOD, variant=variant, note=f"{measure.WRONG}: dx")


@pytest.fixture
def look(tmp_path: Path) -> session.Session:
    return session.Session(tmp_path, CPU, ["matplotlib"])


def test_every_gpu_test_is_in_the_battery_and_its_shares_are_its_time(look: session.Session) -> None:
    first = battery.PARTS[0]
    files = {word for command in first.commands(look).values() for word in command if word.endswith(".py")}
    marked = re.compile(r"mark\.gpu|on_gpu\(")
    tests = ROOT.glob("tests/*/test_*.py")
    assert files == {str(path.relative_to(ROOT)) for path in tests if marked.search(path.read_text())}
    assert sum(each.seconds for each in battery.PARTS) <= 540
    assert first.name == "correctness"
    options = __main__.parser().parse_args(["gpu", "--device", "cpu", "--out", str(look.folder)])
    assert battery.run(options, []) == 1


def test_what_runs_first_is_little(look: session.Session) -> None:
    command = battery.PARTS[0].commands(look)["correctness"]
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider"]
    found = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    assert 100 <= found.stdout.count("::") <= 400


@pytest.mark.parametrize(("ended", "seconds", "state", "text"), [
    ([GOOD, GOOD], 60, "DONE", ""), ([GOOD, BAD, GOOD], 60, "FAIL", "; 1: exit code 2; 1 failed"),
    ([SLOW, GOOD], 60, "PART", f"; 0: {SLOW.note}"),
    ([SLOW, BAD], 60, "FAIL", "; 1: exit code 2; 1 failed"),
    ([], 1, "PART", "; no time was left for 0"),
    ([GOOD, GOOD, SLOW], 60, "FAIL", f"; 2: {SLOW.note}"),
    ([wrong("fused"), wrong("torch")], 60, "FAIL", f"; fused: {measure.WRONG}"),
    ([wrong("torch")], 60, "DONE", ""),
])  # fmt: skip
def test_what_becomes_of_a_part(
    ended: list[Record], seconds: float, state: str, text: str, look: session.Session,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All commands run, also after one that failed, unless the time is up. The one of the part's name must
    end. Wrong results fail it, but for those of the baselines."""
    left = iter(ended)
    monkeypatch.setattr(battery, "process", lambda *command: next(left))
    monkeypatch.setattr(battery, "TESTS", {str(number): ("", "") for number in range(max(1, len(ended)))})
    battery.run_part(look, Part("2", 10), seconds)
    assert look.summary == [("2", state, f"{len(ended)} records in 0 s{text}")]
    assert look.close() == (state == "FAIL")
    if ended:
        found = records.read(look.folder / "2.csv")
        assert list(found["note"]) == [each.note for each in ended]
        assert found["versions"].str.startswith("bnfast=").all()


def test_a_part_that_measures_runs_in_a_process_and_keeps_what_it_made(
    look: session.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(session: session.Session, seconds: float):  # type: ignore[no-untyped-def]
        assert (session.folder, session.device) == (look.folder, CPU)
        assert 50 <= seconds <= 60 - battery.LAST_WORDS - battery.EARLIER  # before it would be interrupted
        yield dataclasses.replace(GOOD, gpu="of its own")
        raise RuntimeError("it broke")

    def process(look: session.Session, name: str, command: list[str], seconds: float) -> Record:
        assert command[:3] == [sys.executable, "-m", "benchmarks.battery"]
        with pytest.raises(RuntimeError, match="it broke"):
            battery.main(*command[3:])
        return BAD

    part = Part("machine", 10, work)
    monkeypatch.setattr(battery, "PARTS", [part])
    monkeypatch.setattr(battery, "process", process)
    battery.run_part(look, part, 60)
    battery.run_part(look, Part("absent", 10, work, "no_such_package"), 60)
    assert [each[:2] for each in look.summary] == [("machine", "FAIL"), ("absent", "NOT RUN")]
    found = records.read(look.folder / "machine.csv")
    assert list(found["gpu"]) == ["of its own", ""]
    assert found["versions"].str.startswith("bnfast=").all()


def test_launches_that_overlap_are_told_apart(look: session.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their process has the variable, and its records another name; only where a GPU can."""
    (part,) = (part for part in battery.PARTS if part.name == "overlap")
    (command,) = part.commands(look).values()
    assert command[:5] == ["env", "BNFAST_PDL=1", sys.executable, "-m", "benchmarks.battery"]
    predicted = dataclasses.replace(GOOD, status=battery.PREDICTED)
    work = battery.overlapping(lambda session, seconds: [predicted, GOOD, BAD])
    (record,) = work(look, 1.0)
    assert (record.status, record.variant) == (CANNOT, "bnfast-pdl")
    gpu = dataclasses.replace(look, device=torch.device("cuda"))
    for capability, statuses in (((8, 9), [CANNOT]), ((9, 0), [MEASURED, CANNOT])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        records_of = list(work(gpu, 1.0))
        assert [each.status for each in records_of] == statuses
        assert {each.variant for each in records_of} == {"bnfast-pdl"}


def test_a_process_of_the_battery_is_recorded(look: session.Session) -> None:
    for code, said, status in ((0, "3 passed", MEASURED), (2, "1 failed", CANNOT)):
        command = [sys.executable, "-c", f"print('{said}'); raise SystemExit({code})"]
        found = battery.process(look, "said", command, 60)
        assert (found.status, found.note) == (status, f"exit code {code}; {said}")


def test_a_process_that_is_late_has_its_last_words(look: session.Session) -> None:
    """And what it started does not outlive it."""
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('2 passed until then')\n"
    )
    # which a shell that starts pytest in the background lets be ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        late = battery.process(look, "late", [sys.executable, "-c", program], 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (late.status, late.note) == (CANNOT, f"{LATE}exit code 0; 2 passed until then")
    state = Path("/proc", (look.folder / "late.log").read_text().split()[0], "stat")
    end = time.monotonic() + 10
    while time.monotonic() < end and state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.05)
    assert time.monotonic() < end


def test_parts_share_the_time_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is asked for alone has all of it; one that is quick leaves its time to the next ones. The
    command ignores interrupts where a shell started it in the background, and its processes must not."""
    given: dict[str, float] = {}

    def noted(look: session.Session, part: Part, seconds: float) -> None:
        given[part.name] = seconds

    parts = [Part("machine", 20), Part("step", 40), Part("tiles", 40)]
    monkeypatch.setattr(battery, "PARTS", parts)
    monkeypatch.setattr(battery, "run_part", noted)
    monkeypatch.setattr(session.Session, "gpu", True)
    monkeypatch.setattr(battery, "begin", lambda options, *rest: session.Session(options.out, CPU, []))
    arguments = ["gpu", "--out", str(tmp_path), "--limit", str(100 + int(battery.SUMMARY))]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for asked, seconds in (([], [20, 50, 100]), (["--part", "machine"], [100])):
            given.clear()
            assert battery.run(__main__.parser().parse_args([*arguments, *asked]), []) == 0
            assert list(given.values()) == pytest.approx(seconds, abs=2)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
