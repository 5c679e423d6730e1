"""A GPU for the jobs of benchmarks/ that is none: tensors stay on the CPU, and torch.cuda says what it
would on a GPU. It finds what would end a job at once on a real one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import battery, cases, measure, session
from benchmarks.records import MEASURED, Record
from benchmarks.resnet import PLAIN, Task
from codegen.cases import Case


class Event:
    """Of the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Event) -> float:
        return (later.time - self.time) * 1e3


def captured(work: Callable[[], Any], pool: Any = None) -> tuple[Any, Any]:
    """A graph whose replay does the work again, and leaves its result where the first one was."""
    result = work()

    def replay() -> None:
        again = work()
        if isinstance(result, Tensor):
            result.copy_(again)

    return SimpleNamespace(replay=replay), result


def of_network(*what: Any) -> list[Case]:
    """Two layers of a network, so small that a CPU takes no time."""
    found = []
    for number, case in enumerate(cases.of_network(*what)[:2]):
        shape = (2, 8, *[3 + number] * (len(case.shape) - 2))
        found.append(dataclasses.replace(case, shape=shape, groups=min(case.groups, 4)))
    return found


def process(look: session.Session, name: str, command: list[str], seconds: float) -> Record:
    """A part that measures does so in this process; commands only say that they have run."""
    if command[1:3] == ["-m", "benchmarks.battery"]:
        battery.main(*command[3:])
    return Record("probe", MEASURED, variant=name, note="exit code 0; 3 passed")


ANSWERS = {
    "get_device_name": "made up", "get_device_properties": SimpleNamespace(multi_processor_count=4),
    "mem_get_info": (1 << 30, 1 << 31), "memory_allocated": 1000, "max_memory_allocated": 5000,
    "graph_pool_handle": (0, 1), "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
    "_sleep": None,
}  # fmt: skip
PATCHES = {
    **{f"torch.cuda.{name}": lambda *given, answer=answer: answer for name, answer in ANSWERS.items()},
    "torch.cuda.Event": Event,
    "benchmarks.timing.is_gpu": lambda device: True,
    "benchmarks.timing.captured": captured,
    "benchmarks.timing.on_a_side_stream": lambda work: work(),
    "benchmarks.timing.COLD_BYTES": 1,
    "benchmarks.session.Session.why_plain_torch": lambda self: None,
    "benchmarks.environment.ensure": list,
    "benchmarks.memory.BATCH": 2,
    "benchmarks.machine.SIZE": 1 << 16,
    "benchmarks.battery.process": process,
    "benchmarks.battery.of_network": of_network,
    "benchmarks.layers.of_network": of_network,
    "benchmarks.tile_sweep.CASES": [Case("BatchNorm", (2, 4, 3, 3), 0, torch.bfloat16, True)],
    # with tests.conftest's network of four layers
    "benchmarks.step.Task": lambda device: Task(device, torch.float64, width=2, classes=10, image=8),
    "benchmarks.step.BATCHES": (4,),
    "benchmarks.step.STAGES": (PLAIN,),
}


def make_up(patch: pytest.MonkeyPatch) -> None:
    """patch: the test's own, so that what a test patches over this is undone before this is."""
    for name, value in PATCHES.items():
        patch.setattr(name, value)
    for name in ("compile", "compile-max"):  # which take half a minute
        patch.setitem(measure.BASELINES, name, dataclasses.replace(measure.BASELINES["torch"], name=name))
