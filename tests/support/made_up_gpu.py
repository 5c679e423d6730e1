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

from benchmarks import (
    battery,
    environment,
    layers,
    machine,
    measure,
    memory,
    session,
    step,
    tile_sweep,
    timing,
)
from benchmarks.records import MEASURED, Record
from benchmarks.resnet import PLAIN, Task
from codegen.cases import Case
from tests.support.steps import QUICK


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


def small(original: Callable[..., list[Case]]) -> Callable[..., list[Case]]:
    """Two layers of a network, so small that a CPU takes no time."""

    def of_network(*what: Any, **options: Any) -> list[Case]:
        found = []
        for number, case in enumerate(original(*what, **options)[:2]):
            shape = (2, 8, *[3 + number] * (len(case.shape) - 2))
            found.append(dataclasses.replace(case, shape=shape, groups=min(case.groups, 4)))
        return found

    return of_network


def process(look: session.Session, name: str, command: list[str], seconds: float) -> Record:
    """A part that measures does so in this process; commands only say that they have run."""
    if command[1:3] == ["-m", "benchmarks.battery"]:
        battery.main(*command[3:])
    return Record("probe", MEASURED, variant=name, note="exit code 0; 3 passed")


def make_up(patch: pytest.MonkeyPatch) -> None:
    """patch: the test's own, so that what a test patches over this is undone before this is."""
    properties = SimpleNamespace(multi_processor_count=4)
    answers: dict[str, Any] = {
        "get_device_name": "made up", "get_device_properties": properties, "mem_get_info": (1 << 30, 1 << 31),
        "memory_allocated": 1000, "max_memory_allocated": 5000, "graph_pool_handle": (0, 1),
    }  # fmt: skip
    nothing = dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep"))
    for name, answer in {**answers, **nothing}.items():
        patch.setattr(torch.cuda, name, lambda *given, answer=answer: answer)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(timing, "is_gpu", lambda device: True)
    patch.setattr(timing, "captured", captured)
    patch.setattr(timing, "on_a_side_stream", lambda work: work())
    patch.setattr(timing, "COLD_BYTES", 1)
    patch.setattr(session.Session, "why_plain_torch", lambda self: None)
    patch.setattr(environment, "ensure", list)
    patch.setattr(memory, "BATCH", 2)
    patch.setattr(machine, "SIZE", 1 << 16)
    patch.setattr(battery, "process", process)
    for module in (layers, battery):
        patch.setattr(module, "of_network", small(module.of_network))
    patch.setattr(tile_sweep, "CASES", [Case("BatchNorm", (2, 4, 3, 3), 0, torch.bfloat16, True)])
    for name in ("compile", "compile-max"):  # which take half a minute
        patch.setitem(measure.BASELINES, name, dataclasses.replace(measure.BASELINES["torch"], name=name))
    # with tests.conftest's network of four layers
    patch.setattr(step, "Task", lambda device: Task(device, torch.float64, width=2, classes=10, image=8))
    patch.setattr(step, "BATCHES", (4,))
    patch.setattr(step, "STAGES", (PLAIN[:3],))
    patch.setattr(step, "EFFORT", QUICK)
