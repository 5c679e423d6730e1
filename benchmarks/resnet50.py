"""ResNet-50's BatchNorm layers, and what a training step of each moves, launches and takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from benchmarks.measure import Times

BLOCKS = (3, 4, 6, 3)  # of each stage, as in He et al. 2015, table 1
IMAGE = 224
COPY_RATE = 4.3e12  # bytes a second: assumed for an H200, and measured by nobody here
FLOOR_LABEL = f"floor at {COPY_RATE / 1e12:.1f} TB/s, an assumption: the copy rate of an H200"


@dataclass(frozen=True)
class Shape:
    """The input of a BatchNorm layer, but for the batch."""

    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.channels} x {self.side}x{self.side}"

    def bytes(self, batch: int, itemsize: int) -> int:
        """T: the size of the input."""
        return batch * self.channels * self.side**2 * itemsize


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are None where nothing was measured."""

    shape: Shape
    count: int
    x_bytes: int
    forward_bytes: int
    backward_bytes: int
    forward_launches: int
    backward_launches: int
    bnfast: Times | None = None
    torch: Times | None = None


def layers() -> list[Shape]:
    """Every BatchNorm of the network, in order. Stages but the first begin by halving the image."""
    side = IMAGE // 2
    found = [Shape(64, side)]
    side //= 2  # max pooling
    for stage, blocks in enumerate(BLOCKS):
        width = 64 * 2**stage
        for block in range(blocks):
            found.append(Shape(width, side))
            if stage > 0 and block == 0:
                side //= 2
            found += [Shape(width, side), Shape(4 * width, side)]
            if block == 0:
                found.append(Shape(4 * width, side))  # the way round, where the shape changes
    return found


def rows(batch: int, itemsize: int, channels_last: bool, sms: int = 132) -> list[Row]:
    """What the kernels' plan says of each distinct shape; no GPU is needed for it."""
    from bnfast.kernels import plan

    found = []
    for shape, count in Counter(layers()).items():
        planned = plan.batch_norm(batch, shape.channels, shape.side**2, itemsize, channels_last, sms=sms)
        found.append(
            Row(
                shape, count, shape.bytes(batch, itemsize), planned.forward_bytes, planned.backward_bytes,
                planned.forward_launches, planned.backward_launches,
            )
        )  # fmt: skip
    return found


def floor(moved: int) -> float:
    """Microseconds that moving so many bytes takes at the assumed copy rate."""
    return moved / COPY_RATE * 1e6


HEADERS = ("C x HxW", "layers", "T MB", "fwd MB", "bwd MB", "runs", "floor us", "bnfast us", "torch us")


def times(found: Times | None, absent: str) -> str:
    return f"{found.forward:.0f}/{found.backward:.0f}" if found else absent


def cells(row: Row, absent: str) -> list[str]:
    """A row for the terminal; forward and backward as a/b. `absent` stands where nothing was measured."""
    return [
        str(row.shape), str(row.count), f"{row.x_bytes / 1e6:.1f}", f"{row.forward_bytes / 1e6:.0f}",
        f"{row.backward_bytes / 1e6:.0f}", f"{row.forward_launches}+{row.backward_launches}",
        f"{floor(row.forward_bytes):.0f}/{floor(row.backward_bytes):.0f}",
        times(row.bnfast, absent), times(row.torch, absent),
    ]  # fmt: skip


def added(found: list[Times | None], counts: list[int], backend: str) -> Times | None:
    """The sum of all times, each as often as it counts; nothing if one was not measured."""
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    forward = sum(count * each.forward for count, each in zip(counts, known, strict=True))
    backward = sum(count * each.backward for count, each in zip(counts, known, strict=True))
    return Times(forward, backward, backend)


def total(rows: list[Row], absent: str) -> list[str]:
    """The last line of the table: all layers of the network."""
    counts = [row.count for row in rows]

    def all_of(name: str) -> int:
        return sum(row.count * int(getattr(row, name)) for row in rows)

    forward, backward = all_of("forward_bytes"), all_of("backward_bytes")
    return [
        "all", str(sum(counts)), f"{all_of('x_bytes') / 1e6:.1f}",
        f"{forward / 1e6:.0f}", f"{backward / 1e6:.0f}",
        f"{all_of('forward_launches')}+{all_of('backward_launches')}",
        f"{floor(forward):.0f}/{floor(backward):.0f}",
        times(added([row.bnfast for row in rows], counts, "all"), absent),
        times(added([row.torch for row in rows], counts, "all"), absent),
    ]  # fmt: skip


SPEED_HEADERS = ("C x HxW", "bnfast fwd", "bwd GB/s", "torch fwd", "bwd GB/s", "torch ran")


def speed(row: Row) -> list[str]:
    """GB/s for both, of the bytes that our plan counts. Torch may move more; these are the same work."""
    found = [str(row.shape)]
    for each in (row.bnfast, row.torch):
        if each is None:
            found += ["-", "-"]
        else:
            pairs = ((row.forward_bytes, each.forward), (row.backward_bytes, each.backward))
            found += [f"{moved / us / 1e3:.0f}" for moved, us in pairs]
    return [*found, row.torch.backend if row.torch else "-"]


CSV_HEADERS = (
    "channels", "height", "width", "layers", "batch", "dtype", "layout", "x_bytes",
    "forward_bytes", "backward_bytes", "forward_launches", "backward_launches",
    "assumed_copy_rate_GBps", "forward_floor_us", "backward_floor_us",
    "bnfast_forward_us", "bnfast_backward_us", "bnfast_forward_GBps", "bnfast_backward_GBps",
    "torch_forward_us", "torch_backward_us", "torch_forward_GBps", "torch_backward_GBps", "torch_backend",
)  # fmt: skip


def csv_row(row: Row, batch: int, dtype: str, layout: str, absent: str) -> list[object]:
    found: list[object] = [
        row.shape.channels, row.shape.side, row.shape.side, row.count, batch, dtype, layout, row.x_bytes,
        row.forward_bytes, row.backward_bytes, row.forward_launches, row.backward_launches, COPY_RATE / 1e9,
        round(floor(row.forward_bytes), 2), round(floor(row.backward_bytes), 2),
    ]  # fmt: skip
    for each in (row.bnfast, row.torch):
        if each is None:
            found += [absent] * 4
        else:
            found += [round(each.forward, 2), round(each.backward, 2)]
            found += [round(row.forward_bytes / each.forward / 1e3, 1)]
            found += [round(row.backward_bytes / each.backward / 1e3, 1)]
    return [*found, row.torch.backend if row.torch else absent]
