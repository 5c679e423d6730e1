"""What torch.compile generates for an H200 is compiled, executed and counted without a GPU, beside ours."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import __main__, inductor, peer_tables, peers, sides
from codegen import SMS, work
from codegen.cases import BF16, DIRECTIONS, Case
from tests.support.versions import TORCH

pytestmark = [
    pytest.mark.static,
    pytest.mark.usefixtures("executor"),
    pytest.mark.skipif(TORCH < (2, 14), reason="Inductor is asked in its own terms, which change"),
]

CASES = [
    Case("BatchNorm", (4, 16, 6, 6), 0, BF16, True, "relu"),
    Case("BatchNorm", (3, 8, 5, 5), 0, BF16, False, "relu", True),
    Case("GroupNorm", (2, 32, 4, 4), 8, BF16, False, "silu"),
    Case("LayerNorm", (24, 96), 0, BF16, False),
]


@pytest.fixture
def one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those from which Inductor chooses, the first."""
    best = sides.best
    monkeypatch.setattr(sides, "best", lambda candidates: best(candidates[:1]))


@pytest.mark.usefixtures("one_configuration")
def test_both_sides_of_each_norm() -> None:
    """Both are right, and count what the expression has to move."""
    for case, sources in zip(CASES, inductor.generated(CASES), strict=True):
        assert not isinstance(sources, str), sources
        t = case.x_bytes
        for side in (sides.ours(case), sides.of_inductor(case, sources, sources)):
            found = [peer_tables.line(case, side, direction) for direction in DIRECTIONS]
            for each in found:
                assert each.apart < peer_tables.ALLOWED, (case, each)
                assert each.read_T > 0.9
                assert each.written_T > 0.9
                assert each.l2_T * t >= 0.9 * (each.read_T + each.written_T - each.kept_T) * t / 2
                assert each.float_atomics == each.spills == 0
                assert each.sums > 0
            assert found[1].read_T > found[0].read_T  # a backward reads dy too


def test_why_there_are_no_sources() -> None:
    """What torch.compile refuses is an answer, and the next request is answered."""
    odd = Case("BatchNorm", (4, 16, 6, 6), 0, BF16, True, "no such activation")
    refused, sources = inductor.generated([odd, CASES[0]])
    assert isinstance(refused, str)
    assert "no such activation" in refused
    assert len(sources) == inductor.SOURCES


@pytest.mark.parametrize("programs", [1, 5, 131, 132, 133, 300, 1000, 10000])
def test_samples_are_of_the_grid(programs: int) -> None:
    chosen = work.samples(programs)
    assert len(chosen) == len(set(chosen)) <= 2 * work.SAMPLED
    assert min(chosen) >= 0
    assert max(chosen) < programs
    assert len(chosen) >= min(programs, work.SAMPLED // 2)
    if programs > 8 * SMS:
        assert len({each % SMS for each in chosen}) == work.SAMPLED // work.OF_SM


@pytest.mark.usefixtures("one_configuration")
def test_samples_stand_for_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of some programs are about those of all."""
    case = Case("BatchNorm", (16, 64, 28, 28), 0, BF16, True, "relu")
    (sources,) = inductor.generated([case])
    assert not isinstance(sources, str)
    monkeypatch.setattr(work, "FEW", 1e9)
    whole = sides.counted(case, sources), sides.our_call(case)
    monkeypatch.setattr(work, "FEW", 0)
    some = sides.counted(case, sources), sides.our_call(case)
    for every, few in zip(whole, some, strict=True):
        for way in DIRECTIONS:
            for a, b in zip(every[way], few[way], strict=True):
                assert (a.kernel, a.programs) == (b.kernel, b.programs)
                assert b.read + b.written == pytest.approx(a.read + a.written, rel=0.1), a.kernel
                assert b.instructions == pytest.approx(a.instructions, rel=0.15), a.kernel
                assert b.fetched == pytest.approx(a.fetched, rel=0.25), a.kernel


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "cases", lambda suite, batch, layout: CASES[:1])
    assert __main__.main(["peers", "--device", "cpu", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1].startswith("ahead ")
    (folder,) = tmp_path.iterdir()
    assert len(pd.read_csv(folder / "peers.csv")) == 4
    assert pd.read_csv(folder / "launches.csv")["provider"].nunique() == 2
    assert (folder / "peers.png").exists()
