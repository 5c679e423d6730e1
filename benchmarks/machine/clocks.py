"""What a GPU says of itself: name, driver, clocks, temperature and power, at the moment it is asked."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.records import CANNOT, MEASURED, Record

FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
PATIENCE = 10.0  # seconds, at most, for an answer

Ask = Callable[
    [Sequence[str], float], str
]  # a command and seconds -> what it prints; OSError, SubprocessError


@dataclass(frozen=True)
class Clocks:
    """Each None where it is not known."""

    name: str | None = None
    driver: str | None = None
    sm_MHz: float | None = None
    memory_MHz: float | None = None
    temperature_C: float | None = None
    power_W: float | None = None


def run(command: Sequence[str], seconds: float) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds).stdout


def number(text: str) -> float | None:
    """Of nvidia-smi, which says "[N/A]" and the like where it has none."""
    try:
        return float(text)
    except ValueError:
        return None


def parse(text: str) -> Clocks:
    """nvidia-smi's CSV with FIELDS. Nothing is known from anything but one line of it: of several, which have
    more values, there is no telling whose they are."""
    values = [value.strip() for value in text.strip().split(",")]
    if len(values) != len(FIELDS):
        return Clocks()
    name, driver = (None if value.startswith("[") else value for value in values[:2])
    return Clocks(name, driver, *map(number, values[2:]))


def selection(device: torch.device) -> list[str]:
    """Names a CUDA device to the driver's tools, whose numbers know nothing of CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return [] if uuid is None else [f"--id=GPU-{uuid}"]


def read(device: torch.device, ask: Ask = run, seconds: float = PATIENCE) -> Clocks:
    """Asks nvidia-smi, which may be missing, slow, or not know everything. An idle GPU's clock is low."""
    fields, form = f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"
    try:
        found = parse(ask(["nvidia-smi", *selection(device), fields, form], seconds))
    except (OSError, subprocess.SubprocessError):
        found = Clocks()
    if found.name is None and device.type == "cuda":
        return replace(found, name=torch.cuda.get_device_name(device))
    return found


def clocks(device: torch.device, seconds: float = PATIENCE, ask: Ask = run) -> Iterator[Record]:
    """One line: clock_MHz is the SMs'; memory clock and power are in its note."""
    found = read(device, ask, min(seconds, PATIENCE))
    known = replace(found, name=None) != Clocks()
    beside = (("memory clock", found.memory_MHz, "MHz"), ("power", found.power_W, "W"))
    said = ", ".join(f"{what} {value:g} {unit}" for what, value, unit in beside if value is not None)
    yield Record(
        "probe", MEASURED if known else CANNOT, "clocks", "nvidia-smi", clock_MHz=found.sm_MHz,
        temperature_C=found.temperature_C, note=said if known else "nvidia-smi told nothing",
        gpu=found.name or "", driver=found.driver or "",
    )  # fmt: skip
