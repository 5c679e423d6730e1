"""The comparison with torch.compile: its cases, the model of launches of anybody's, and its tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import __main__, inductor, model, peer_tables, peers, sides
from benchmarks.inductor import Request
from benchmarks.records import MEASURED, Record, frame
from benchmarks.sides import Side
from codegen.cases import BF16, DIRECTIONS, Case
from codegen.work import Final, Moved, Work
from tests.support.made_up_gpu import make_up

CASE = Case("BatchNorm", (4, 64, 56, 56), 0, BF16, True, "relu")


# 264 programs, of which each of 132 SMs has two at a time, that read 1 MB and write 1 MB
LAUNCH = Work(
    kernel="kernel", programs=264, warps=4, registers=64, spills=0, resident=2, in_flight=65536.0,
    float_atomics=0, instructions=0.0, fetched=0.0, again=0.0, useful=30.0, transferred=32.0, wavefronts=0.0,
    barriers=0, tensors=(Moved(1, 1e6, 1e6),),
)  # fmt: skip


def launch(*tensors: Moved, **changes: Any) -> Work:
    """As LAUNCH, but for these."""
    return dataclasses.replace(LAUNCH, **({"tensors": tensors} if tensors else {}), **changes)


# the model


@pytest.mark.parametrize(("changes", "microseconds"), [
    ({}, 2 / 4.3),
    ({"instructions": 8000}, 2 * 8000 / 4 / 1755),
    ({"fetched": 5.5e6 / 264 * 3}, 3.0),
    ({"fetched": 64 * 1755, "programs": 1, "in_flight": 1e9}, 1.0),  # all of it goes to one SM
    ({"in_flight": 1024}, 2e6 / (1024 * 132) * 0.7),
    ({"barriers": 1755, "resident": 1}, 2 * 30 + 2e6 / (65536 * 132) * 0.7),  # one after the other
], ids=["memory", "instructions", "L2", "one SM's L2", "latency", "barriers"])  # fmt: skip
def test_a_launch_takes_as_long_as_what_binds_it(changes: dict[str, float], microseconds: float) -> None:
    parts = model.of_work(launch(**changes))
    assert parts == pytest.approx((microseconds, model.GAP, 0.0, 0.0), rel=1e-6)


def test_what_is_added_to_it() -> None:
    parts = model.of_work(launch(wavefronts=50, final=Final(8, 17)))
    assert parts[1:] == pytest.approx((1.5, 2 * 50 / 1755, (900 + 17 * 390 + 8 * 30) / 1755))


def test_a_few_programs_starve() -> None:
    """An SM without a program waits for nothing, and loads nothing."""
    few, many = (model.of_work(launch(programs=n, in_flight=4096 * n / 132)).streaming for n in (66, 264))
    assert few == pytest.approx(4 * many)
    unstarved = model.of_work(launch(programs=66, in_flight=2048), starved=False)
    assert unstarved.streaming == pytest.approx(2 / 4.3)


@pytest.mark.parametrize("programs", [264, 2640])
@pytest.mark.parametrize("megabytes", [20, 50, 500])
def test_a_second_read_comes_from_l2_where_it_fits(megabytes: int, programs: int) -> None:
    """Of what runs at a time, which is all of it or a tenth."""
    read = megabytes * 1e6
    work = launch(Moved(1, read, 0.0), again=read / programs, fetched=2 * read / programs, programs=programs)
    at_a_time = megabytes * 264 / programs
    lost = min(1.0, max(0.0, at_a_time / 30 - 1)) * read
    assert model.from_memory(work) == pytest.approx(read + lost)
    parts = model.of_work(work, starved=False)
    assert parts.streaming == pytest.approx(max((read + lost) / 4.3e6, 2 * read / 5.5e6))


def test_an_earlier_launch_leaves_its_tensors_in_l2() -> None:
    x, y = Moved(1, 20e6, 0.0), Moved(2, 0.0, 20e6)
    small = [launch(Moved(1, 5e6, 0.0)), launch(Moved(1, 5e6, 0.0), y)]
    assert model.left_in_l2(small) == [0.0, 5e6]
    between = [launch(x), launch(y), launch(x, Moved(2, 20e6, 0.0))]
    # of x two thirds, since twice its size was touched, 40 MB
    assert model.left_in_l2(between) == [0.0, 0.0, pytest.approx(20e6 * (2 / 3) + 20e6)]


def test_readings_of_the_same_work_are_the_same() -> None:
    calls = [[launch(Moved(k, 1e6, 1e6), wavefronts=100)] for k in (1, 2)]
    first, second = (model.readings(call) for call in calls)
    assert first == second
    assert first.sums == pytest.approx(2 / 4.3 + 1.5 + 2 * 100 / 1755)


# the cases, and what they are to Inductor


def test_the_command_knows_the_suites() -> None:
    assert set(__main__.PEERS) == peers.BATCH.keys() == {*peers.NETWORKS, "layernorm"}


def test_cases() -> None:
    found = peers.cases("small", None, None)
    assert {case.shape[0] for case in found} == {4}
    assert all(case.channels_last for case in found)
    both = peers.cases("resnet50", 8, "both")
    assert {(case.shape[0], case.channels_last) for case in both} == {(8, True), (8, False)}
    assert len(both) == 2 * len(found)
    assert {case.groups for case in peers.cases("groupnorm", None, None)} == {32}
    assert [case.shape for case in peers.cases("layernorm", 64, None)][0] == (64, 768)


@pytest.mark.parametrize("case", [CASE, Case("GroupNorm", (2, 64, 8, 8), 32, BF16, False, "silu", True)])
def test_a_case_travels_as_json(case: Case) -> None:
    assert Request(**json.loads(json.dumps(dataclasses.asdict(Request.of(case))))).case == case


@pytest.mark.parametrize(("norm", "residual", "inputs"), [
    ("BatchNorm", True, 6), ("GroupNorm", True, 4), ("LayerNorm", False, 3),
])  # fmt: skip
def test_the_expression_is_a_graph_of_its_inputs(norm: str, residual: bool, inputs: int) -> None:
    shape = (6, 8) if norm == "LayerNorm" else (2, 8, 4, 4)
    case = Case(norm, shape, 2, torch.float32, False, "relu", residual)
    given = inductor.empty(case, "cpu")
    assert len(given) == inputs == len(inductor.names(case))
    for t in given:
        t.data.uniform_(0.5, 1.5)
    again = [t.clone() for t in given]
    assert (inductor.traced(case)(*given) == inductor.expression(case)(*again)).all()


# the tables


def line(provider: str, direction: str, **changes: float) -> peer_tables.Line:
    made = dict.fromkeys(peer_tables.Line.__dataclass_fields__, 1)
    made |= {"provider": provider, "direction": direction, "kernels": "a b", **changes}
    return peer_tables.Line(**made)


def some() -> pd.DataFrame:
    """Behind by all readings forward, ahead by one backward."""
    lines = [
        line("bnfast", "backward", model=5.0, apart=0.001),
        line("inductor", "backward", model=10.0, apart=0.001),
        line("bnfast", "forward", model=6.0, unstarved=6.0, sums=4.0, apart=0.5),
        line("inductor", "forward", model=5.0, unstarved=5.0, sums=3.0, apart=0.001),
    ]  # fmt: skip
    return peer_tables.frame(CASE, lines)


def test_the_worst_comes_first() -> None:
    both = peer_tables.compared(some())
    assert both["direction"].tolist() == ["forward", "backward"]
    assert both["model"].tolist() == [1.2, 0.5]
    assert peer_tables.verdict(both) == "ahead 1, equal 0, behind 1"
    assert peer_tables.agreed(both) == 1
    table = peer_tables.ratios(both)
    assert table["case"].tolist() == [f"BN 4x64 x 56x56 relu NHWC {way}" for way in ("fwd", "bwd")]
    assert table["us"].tolist() == ["6.0/5.0", "5.0/10.0"]
    assert len(peer_tables.counts(both)) == 2


def test_wrong_results_are_named() -> None:
    assert peer_tables.wrong(some()) == ["bnfast: BN 4x64 x 56x56 relu NHWC fwd is 0.5 from fp64"]


def test_a_line_adds_up_its_launches() -> None:
    large = launch(Moved(1, 1e6, 0.0), fetched=1e6 / 264, wavefronts=10, spills=2)
    tiny = launch(Moved(2, 64.0, 0.0), programs=1, registers=80, barriers=5, fetched=64.0)
    side = Side("bnfast", {"forward": [large, tiny]}, {"forward": 0.1}, 4)
    found = peer_tables.line(CASE, side, "forward")
    t = CASE.x_bytes
    assert (found.launches, found.programs, found.registers) == (2, 264, 80)
    assert (found.spills, found.barriers) == (2, 5)
    assert (found.read_T, found.kwavefronts) == (pytest.approx((1e6 + 64) / t), 2.64)
    assert found.efficiency == pytest.approx(30 / 32)
    rows = peer_tables.launches(CASE, side, "forward")
    assert sum(row["streaming"] + row["gaps"] + row["shared"] for row in rows) == pytest.approx(found.model)


def test_measured_times_stand_beside_modelled_ones() -> None:
    from benchmarks.cases import columns

    known = {**columns(CASE), "status": MEASURED, "direction": "forward", "mode": "eager"}
    made = [
        Record(**known, variant=variant, cache=cache, us=us)
        for variant, cache, us in (("bnfast", "cold", 8.0), ("bnfast", "warm", 1.0), ("compile", "cold", 4.0))
    ]  # fmt: skip
    both = peer_tables.compared(peer_tables.timed(some(), frame(made)))
    assert both["measured"].tolist()[0] == 2.0
    assert both["measured"].isna().tolist() == [False, True]
    assert "measured" in peer_tables.ratios(both)


def test_known_passes() -> None:
    table = peers.known([CASE, dataclasses.replace(CASE, activation=None)])
    assert table.columns.tolist() == ["known, not run", "launches", "T", "64 x 56"]
    assert len(table) == sum(each.layout == "channels_last" for each in peers.KNOWN)
    assert peers.known([Case("LayerNorm", (8, 64), 0, BF16, False)]).empty


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peer_tables.draw(tmp_path / "peers.png", peer_tables.compared(some()))
    assert (tmp_path / "peers.png").stat().st_size > 0


def test_what_cannot_be_compiled_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "why_not_counted", lambda: "there is no C compiler")
    assert __main__.main(["peers", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "NOT RUN  peers there is no C compiler" in capsys.readouterr().out


@pytest.mark.slow
def test_on_a_gpu_both_are_timed(
    plain_torch_in_one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On one that is made up, where nothing is compiled."""

    def side(name: str) -> Side:
        own = {way: [launch(Moved(k, 1e6, 1e6), fetched=8e3)] for k, way in enumerate(DIRECTIONS)}
        return Side(name, own, dict.fromkeys(DIRECTIONS, 0.001), 2)

    make_up(monkeypatch)
    case = Case("BatchNorm", (2, 8, 3, 3), 0, BF16, True, "relu", suite="suite", network="network")
    monkeypatch.setattr(peers, "why_not_counted", lambda: None)
    monkeypatch.setattr(peers, "cases", lambda suite, batch, layout: [case])
    monkeypatch.setattr(inductor, "generated", lambda cases: iter([["", ""] for _ in cases]))
    monkeypatch.setattr(sides, "ours", lambda case: side("bnfast"))
    monkeypatch.setattr(sides, "of_inductor", lambda case, sources, small: side("inductor"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert __main__.main(["peers", "--device", "cpu", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "measured" in said
    assert said.rstrip().endswith("ahead 0, equal 2, behind 0")
    (folder,) = tmp_path.iterdir()
    assert (pd.read_csv(folder / "peers.csv")["measured"] > 0).all()
