"""What the probes must know of a GPU before they measure it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Facts:
    """Bytes of L2 and of memory that is free, and the number of streaming multiprocessors (SMs)."""

    l2_bytes: int
    free_bytes: int
    processors: int

    @property
    def memory(self) -> int:
        """The bytes a probe may take: others may be at work on the GPU, and the allocator rounds up."""
        return self.free_bytes // 4


def facts(device: torch.device) -> Facts:
    """Asks torch. ValueError if it is no CUDA device, or not the current one, which launches and events go
    to."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise ValueError(f"device is {device}; these probes are for CUDA GPUs only")
    if device.index not in (None, torch.cuda.current_device()):
        raise ValueError(f"device is {device}, but the current one is cuda:{torch.cuda.current_device()}")
    found = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    return Facts(found.L2_cache_size, free, found.multi_processor_count)
