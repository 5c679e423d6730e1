"""One normalization layer with what follows it, in one dtype and layout: what is compiled, and measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """act(norm(x) + z). norm: "BatchNorm", "GroupNorm" or "InstanceNorm", and where nothing is measured
    "BatchRenorm" and "LayerNorm" too. groups: of GroupNorm, 0 for BatchNorm, channels for InstanceNorm.
    shape: of x, [N, C, *size]. activation: as bnfast's layers name it, or None. residual: whether there is a
    z. count: layers of this form in the network, if of one. Without `training`, the layer is in eval.

    Parameters and statistics are fp32, but for fp64, and where torch.nn takes none but x's dtype (GroupNorm
    on a GPU)."""

    norm: str
    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    channels_last: bool
    activation: str | None = None
    residual: bool = False
    count: int = 1
    suite: str = ""
    network: str = ""
    training: bool = True

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be [N, C, *size] of positive sizes, not {self.shape}")
        if self.channels_last and len(self.shape) not in FORMATS:
            raise ValueError(f"channels_last is a layout of 4-D and 5-D tensors, not of {self.shape}")

    def __str__(self) -> str:
        what = self.norm + " + z" * self.residual + f" + {self.activation}" * bool(self.activation)
        groups = f" {self.groups} groups" if self.norm == "GroupNorm" else ""
        mode = "" if self.training else " eval"
        return f"{what} {'x'.join(map(str, self.shape))} {NAMES[self.dtype]} {self.layout}{groups}{mode}"

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def memory_format(self) -> torch.memory_format:
        return FORMATS[len(self.shape)] if self.channels_last else torch.contiguous_format

    @property
    def x_bytes(self) -> int:
        """T."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def parameter_dtype(self) -> torch.dtype:
        return self.dtype if self.norm == "GroupNorm" or self.dtype == torch.float64 else torch.float32

    def empty(self, device: torch.device | str = "cpu") -> Tensor:
        """Of x's shape, dtype and layout; on a CPU, no memory is used until it is written to."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format)

    def tensor(self, device: torch.device, seed: int) -> Tensor:
        """Normal random numbers (never zeros: those draw less power) of x's shape, dtype and layout."""
        generator = torch.Generator(device).manual_seed(seed)
        return self.empty(device).normal_(generator=generator)
