"""On what and of what a figure was measured: the columns that all records of a run share, and what a GPU says
of itself at the moment it is asked."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from typing import Any

import torch

import bnfast
from benchmarks import ROOT, timing
from bnfast import dispatch

# columns of a Record, and nvidia-smi's names of them
FIELDS = {"driver": "driver_version", "clock_MHz": "clocks.sm", "temperature_C": "temperature.gpu"}
PATIENCE = 10.0  # seconds, at most, for an answer


def output(*command: str) -> str:
    """What a program prints; nothing if it is not there, fails, or takes too long."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def clocks(device: torch.device) -> dict[str, Any]:
    """Those of FIELDS that are known. nvidia-smi may be missing, or not know everything: it says "[N/A]" and
    the like. Nothing is known from several lines of it, as there is no telling whose they are. An idle GPU's
    clock is low."""
    gpu = timing.is_gpu(device)
    # CUDA's numbers of devices know CUDA_VISIBLE_DEVICES, and the driver's tools do not
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if gpu else None
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits"]
    values = output(*query, *([] if uuid is None else [f"--id=GPU-{uuid}"])).split(", ")
    known = dict(zip(FIELDS, values, strict=True)) if len(values) == len(FIELDS) else {}
    return {
        name: float(value) if value.isdecimal() else value
        for name, value in known.items()
        if not value.startswith("[")
    }


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
    gpu = timing.is_gpu(device)
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else "",
        "driver": clocks(device).get("driver", "") if gpu else "", "versions": versions(), "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
