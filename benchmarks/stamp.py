"""On what and of what a figure was measured: the columns that every record of a run shares."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import bnfast

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def commit() -> str:
    """Of this checkout, with a + if files differ from it; "unknown" outside of one."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    return found + "+" * bool(_output("git", "status", "--porcelain", "--untracked-files=no"))


def versions() -> str:
    """Of everything that computes."""
    try:
        import triton

        tritons = triton.__version__
    except ImportError:
        tritons = "none"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else "none"
    parts = {
        "bnfast": bnfast.__version__, "torch": torch.__version__, "triton": tritons, "cudnn": cudnn,
        "cuda": torch.version.cuda or "none", "python": platform.python_version(),
    }  # fmt: skip
    return " ".join(f"{name}={version}" for name, version in parts.items())


def columns(device: torch.device) -> dict[str, Any]:
    """gpu, driver, versions, commit and date (UTC) of a Record."""
    gpu = driver = ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[
            0
        ]
    return {
        "gpu": gpu, "driver": driver, "versions": versions(), "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
