"""One normalization layer with what follows it, in one dtype and layout: what is compiled, and measured. And
those of them that have lines in budgets.csv."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {FP32: "fp32", torch.float64: "fp64", BF16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
DIRECTIONS = ("forward", "backward")
LAST, BOTH = (True,), (True, False)  # channels_last, and contiguous too


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


def layers(
    norm: str, *shapes: tuple[int, ...], after: Iterable[str] = ("",),
    dtypes: Iterable[torch.dtype] = (BF16,), last: Iterable[bool] = (False,), groups: int = 0,
    training: bool = True,
) -> list[Case]:  # fmt: skip
    """All combinations. after: "", an activation, "z", or "z + " and an activation."""
    return [
        Case(
            norm, shape, shape[1] if norm == "InstanceNorm" else groups, dtype, channels_last,
            what.removeprefix("z").removeprefix(" + ") or None, what.startswith("z"), training=training,
        )
        for shape, what, dtype, channels_last in itertools.product(shapes, after, dtypes, last)
    ]  # fmt: skip


# Where the time of real networks goes, and each way through memory that the kernels have
CASES = (
    # ResNet-50: the stem, the wide ends of blocks with and without what follows, the last stage
    *layers("BatchNorm", (256, 64, 112, 112), after=["relu"], last=BOTH),
    *layers("BatchNorm", (256, 256, 56, 56), after=["", "z + relu"], last=BOTH),
    *layers("BatchNorm", (256, 128, 28, 28), after=["relu"], last=BOTH),
    *layers("BatchNorm", (256, 1024, 14, 14), after=["", "z + relu"], last=BOTH),
    *layers("BatchNorm", (64, 512, 7, 7), after=["relu"], last=BOTH),
    *layers("BatchNorm", (4, 64, 56, 56), after=["relu"], last=BOTH),
    # whole channels in one launch: kept in registers, read again from the caches, with their lanes gathered
    *layers("BatchNorm", (32, 1024, 14, 14), after=["relu", "z + relu", "silu"]),
    *layers("BatchNorm", (32, 512, 28, 28), after=["relu"]),
    *layers("BatchNorm", (4, 512, 7, 7), after=["relu"], last=LAST),
    *layers("BatchNorm", (256, 256, 56, 56), dtypes=[FP32], last=BOTH),
    *layers("BatchNorm", (256, 256, 56, 56), last=BOTH, training=False),
    *layers("BatchNorm", (256, 256, 56, 56), after=["z + relu"], last=LAST, training=False),
    *layers("BatchRenorm", (64, 256, 14, 14), last=BOTH),
    # diffusion networks: groups that a program holds in both directions, forward only, in neither; volumes
    *layers("GroupNorm", (16, 1280, 16, 16), after=["", "relu", "silu"], groups=32),
    *layers("GroupNorm", (16, 320, 64, 64), last=(False, True), groups=32),
    *layers("GroupNorm", (16, 640, 64, 64), groups=32),
    *layers("InstanceNorm", (2, 32, 128, 128, 128), (2, 320, 8, 8, 8)),
    # transformers
    *layers("LayerNorm", (16384, 768), (16384, 4096)),
    *layers("LayerNorm", (16384, 768), dtypes=[FP32]),
    # rows too long for a program to hold, and an activation, which LayerNorm's backward applies beforehand
    *layers("LayerNorm", (64, 40000)),
    *layers("LayerNorm", (16384, 768), after=["relu"]),
)
