"""What a training step of a layer moves, launches and takes: rows of one kind for all suites, as lines for a
terminal and for CSV files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.measure import Times
from benchmarks.suites import Network, Shape

COPY_RATE = 4.3e12  # bytes a second: assumed for an H200, and measured by nobody here
FLOOR_LABEL = f"floor at {COPY_RATE / 1e12:.1f} TB/s, an assumption: the copy rate of an H200"


class Planned(Protocol):
    """What is read of a plan: plan.BatchNormPlan, group_plan.GroupNormPlan."""

    @property
    def x_bytes(self) -> int: ...
    @property
    def forward_bytes(self) -> int: ...
    @property
    def backward_bytes(self) -> int: ...
    @property
    def forward_launches(self) -> int: ...
    @property
    def backward_launches(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """Layers of one shape, or all of a network: bytes, launches and times of each, or of all of them. Times
    are None where nothing was measured."""

    label: str
    count: int
    x_bytes: int
    forward_bytes: int
    backward_bytes: int
    forward_launches: int
    backward_launches: int
    shape: Shape | None = None  # None: of a whole network
    bnfast: Times | None = None
    torch: Times | None = None


def planned(network: Network, shape: Shape, itemsize: int, channels_last: bool, sms: int) -> Planned:
    """The kernels' own plan of one layer."""
    from bnfast.kernels import group_plan, plan

    size, groups = (network.batch, shape.channels, shape.positions), network.groups_of(shape)
    if groups:
        return group_plan.group_norm(*size, groups, itemsize, channels_last, sms=sms)
    return plan.batch_norm(*size, itemsize, channels_last, sms=sms)


def rows(network: Network, itemsize: int, channels_last: bool, sms: int = 132) -> list[Row]:
    """What the kernels' plan says of each distinct shape; no GPU is needed for it."""
    found = []
    for shape, count in Counter(network.layers).items():
        p = planned(network, shape, itemsize, channels_last, sms)
        bytes_and_launches = (
            p.x_bytes, p.forward_bytes, p.backward_bytes, p.forward_launches, p.backward_launches
        )  # fmt: skip
        found.append(Row(str(shape), count, *bytes_and_launches, shape))
    return found


def total(rows: Sequence[Row], label: str = "all") -> Row:
    """All layers of a network as one row; without times if one was not measured."""

    def all_of(name: str) -> int:
        return sum(row.count * int(getattr(row, name)) for row in rows)

    def added(name: str) -> Times | None:
        found = [(row.count, getattr(row, name)) for row in rows]
        if any(times is None for _, times in found):
            return None
        forward = sum(count * each.forward for count, each in found)
        backward = sum(count * each.backward for count, each in found)
        return Times(forward, backward, " ".join(sorted({each.backend for _, each in found})))

    return Row(
        label, sum(row.count for row in rows), all_of("x_bytes"), all_of("forward_bytes"),
        all_of("backward_bytes"), all_of("forward_launches"), all_of("backward_launches"),
        bnfast=added("bnfast"), torch=added("torch"),
    )  # fmt: skip


def floor(moved: int) -> float:
    """Microseconds that moving so many bytes takes at the assumed copy rate."""
    return moved / COPY_RATE * 1e6


def headers(first: str) -> tuple[str, ...]:
    return (first, "layers", "T MB", "fwd MB", "bwd MB", "runs", "floor us", "bnfast us", "torch us")


def cells(row: Row, absent: str) -> list[str]:
    """A row for the terminal; forward and backward as a/b. `absent` stands where nothing was measured."""

    def times(found: Times | None) -> str:
        return f"{found.forward:.0f}/{found.backward:.0f}" if found else absent

    return [
        row.label, str(row.count), f"{row.x_bytes / 1e6:.1f}", f"{row.forward_bytes / 1e6:.0f}",
        f"{row.backward_bytes / 1e6:.0f}", f"{row.forward_launches}+{row.backward_launches}",
        f"{floor(row.forward_bytes):.0f}/{floor(row.backward_bytes):.0f}",
        times(row.bnfast), times(row.torch),
    ]  # fmt: skip


SPEED_HEADERS = ("C x size", "bnfast fwd", "bwd GB/s", "torch fwd", "bwd GB/s", "torch ran")


def rates(row: Row, times: Times) -> tuple[float, float]:
    """GB/s each way, of the bytes that our plan counts. Torch may move more; these are the same work."""
    return row.forward_bytes / times.forward / 1e3, row.backward_bytes / times.backward / 1e3


def speed(row: Row) -> list[str]:
    found = [row.label]
    for each in (row.bnfast, row.torch):
        found += ["-", "-"] if each is None else [f"{rate:.0f}" for rate in rates(row, each)]
    return [*found, row.torch.backend if row.torch else "-"]


CSV_HEADERS = (
    "network", "norm", "groups", "channels", "size", "layers", "batch", "dtype", "layout", "x_bytes",
    "forward_bytes", "backward_bytes", "forward_launches", "backward_launches",
    "assumed_copy_rate_GBps", "forward_floor_us", "backward_floor_us",
    "bnfast_forward_us", "bnfast_backward_us", "bnfast_forward_GBps", "bnfast_backward_GBps",
    "torch_forward_us", "torch_backward_us", "torch_forward_GBps", "torch_backward_GBps", "torch_backend",
)  # fmt: skip


def csv_row(network: Network, row: Row, dtype: str, layout: str, absent: str) -> list[object]:
    """One shape, as a line under CSV_HEADERS. groups: 0 for BatchNorm."""
    assert row.shape is not None
    found: list[object] = [
        network.name, network.norm, network.groups_of(row.shape), row.shape.channels,
        "x".join(map(str, row.shape.size)), row.count, network.batch, dtype, layout, row.x_bytes,
        row.forward_bytes, row.backward_bytes, row.forward_launches, row.backward_launches, COPY_RATE / 1e9,
        round(floor(row.forward_bytes), 2), round(floor(row.backward_bytes), 2),
    ]  # fmt: skip
    for each in (row.bnfast, row.torch):
        if each is None:
            found += [absent] * 4
        else:
            found += [round(each.forward, 2), round(each.backward, 2)]
            found += [round(rate, 1) for rate in rates(row, each)]
    return [*found, row.torch.backend if row.torch else absent]
