"""On what and of what a figure was measured: the columns that all records of a run share, and what a GPU says
of itself at the moment it is asked."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

import bnfast
from benchmarks import ROOT, timing
from bnfast import dispatch

FIELDS = ("name", "driver_version", "clocks.sm", "temperature.gpu")
PATIENCE = 10.0  # seconds, at most, for an answer


@dataclass(frozen=True)
class Clocks:
    """What nvidia-smi tells of a GPU; each None where it is not known."""

    name: str | None = None
    driver: str | None = None
    sm_MHz: float | None = None
    temperature_C: float | None = None


def output(*command: str) -> str:
    """What a program prints; nothing if it is not there, fails, or takes too long."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def clocks(device: torch.device) -> Clocks:
    """nvidia-smi may be missing, or not know everything: it says "[N/A]" and the like. Nothing is known from
    several lines of it, as there is no telling whose they are. An idle GPU's clock is low."""
    gpu = timing.is_gpu(device)
    # CUDA's numbers of devices know CUDA_VISIBLE_DEVICES, and the driver's tools do not
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if gpu else None
    which = [] if uuid is None else [f"--id=GPU-{uuid}"]
    said = output("nvidia-smi", *which, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    values = [None if value.startswith("[") else value for value in said.split(", ")]
    name, driver, *numbers = values if len(values) == len(FIELDS) else [None] * len(FIELDS)
    known = [float(number) if number and number.isdecimal() else None for number in numbers]
    return Clocks(name or (torch.cuda.get_device_name(device) if gpu else None), driver, *known)


def commit() -> str:
    """Of this checkout, with a + if files differ from it; "unknown" outside of one."""
    found = output("git", "rev-parse", "--short=12", "HEAD")
    return found + "+" * bool(output("git", "status", "--porcelain", "-uno")) if found else "unknown"


def versions() -> str:
    """Of everything that computes."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else "none"
    parts = {
        "bnfast": bnfast.__version__, "torch": torch.__version__, "triton": dispatch.TRITON_VERSION or "none",
        "cudnn": cudnn, "cuda": torch.version.cuda or "none", "python": platform.python_version(),
    }  # fmt: skip
    return " ".join(f"{name}={version}" for name, version in parts.items())


def columns(device: torch.device) -> dict[str, Any]:
    """gpu, driver, versions, commit and date (UTC) of a Record."""
    found = clocks(device) if timing.is_gpu(device) else Clocks()
    return {
        "gpu": found.name or "", "driver": found.driver or "", "versions": versions(), "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
