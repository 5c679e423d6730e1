"""Sizes -> what a GroupNorm launches, and what a training step of it moves. InstanceNorm is as many groups as
channels. Pure Python, as plan.py.

n, c, s, itemsize, channels_last, aligned and sms are those of plan.batch_norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cell_plan import CellSweep, cell_sweep
from .epilogue import NO_EPILOGUE_PLAN, EpiloguePlan
from .plan import Sweep, map_sweep, reduce_sweep
from .records import Problem


def held(x: Problem, groups: int, inputs: int, activation: str = "none", kept: str = "") -> CellSweep | None:
    """The plan of one launch, for cells that a program can hold of each of `inputs` tensors (1: a forward, 2:
    a backward). None: they are swept twice, as all are where they are no runs of memory. kept: of a residual,
    for the backward: "residual", "mask" or ""."""
    if x.channels_last and x.s > 1:
        return None
    # held in full precision, dy times any other slope takes more registers than there are [sass]
    if inputs > 1 and activation != "none" and (activation not in ("relu", "relu6") or kept == "residual"):
        return None
    cells = cell_sweep(x.n, groups, x.c // groups, x.s, x.itemsize, x.aligned, inputs)
    # of signs, a byte for each vector is written or read
    return None if cells is not None and kept == "mask" and cells.tile.vec != 8 else cells


def swept(
    make: Callable[..., Sweep], x: Problem, groups: int, by_group: bool, inputs: int, activation: str = "none"
) -> Sweep:
    """The plan of one sweep, by plan.reduce_sweep or plan.map_sweep. by_group: contiguous groups are runs of
    memory, and seen as channels."""
    if by_group:
        seen, group = x._replace(n=1, c=groups, s=x.c // groups * x.s), 1
    else:
        seen, group = x._replace(n=1), x.c // groups
    return make(seen, inputs, x.n, group, activation)


@dataclass(frozen=True)
class GroupNormPlan:
    """What a training step over x [n, c, s] launches and moves, where all gradients are wanted. forward and
    backward are one launch that holds cells, or two sweeps; the backward has one launch more, which adds up
    what each sample gives for weight and bias."""

    n: int
    c: int
    s: int
    groups: int
    itemsize: int
    forward: CellSweep | tuple[Sweep, Sweep]
    backward: CellSweep | tuple[Sweep, Sweep]
    epilogue: EpiloguePlan = NO_EPILOGUE_PLAN

    @property
    def forward_launches(self) -> int:
        return 1 if isinstance(self.forward, CellSweep) else 2

    @property
    def backward_launches(self) -> int:
        return 2 if isinstance(self.backward, CellSweep) else 3

    @property
    def x_bytes(self) -> int:
        """T: the bytes of x."""
        return self.n * self.c * self.s * self.itemsize

    @property
    def forward_bytes(self) -> int:
        """x once, or twice with what sweeps hand over; y once; the table of all cells, written, and read by
        the second sweep; what follows adds its own. Weight and bias are not counted, nor what several
        programs read of the table."""
        more = self.epilogue.forward_bytes(self.n * self.c * self.s, self.itemsize)
        if isinstance(self.forward, CellSweep):
            return 2 * self.x_bytes + more + self._table_bytes
        return 3 * self.x_bytes + more + 2 * self._handed_bytes(self.forward[0]) + 2 * self._table_bytes

    @property
    def backward_bytes(self) -> int:
        """dy and x once, or twice with what sweeps hand over; dx once; the forward's table, and of sweeps
        another one out and back; what each sample gives for weight and bias, out and back; what follows
        adds its own."""
        given = 2 * 2 * self.n * self.c * self._wide
        given += self.epilogue.backward_bytes(self.n * self.c * self.s, self.itemsize)
        if isinstance(self.backward, CellSweep):
            return 3 * self.x_bytes + self._table_bytes + given
        return 5 * self.x_bytes + 2 * self._handed_bytes(self.backward[0]) + 3 * self._table_bytes + given

    @property
    def _wide(self) -> int:
        """Bytes of a number that statistics are kept in."""
        return max(4, self.itemsize)

    @property
    def _table_bytes(self) -> int:
        """Two numbers a cell."""
        return 2 * self.n * self.groups * self._wide

    def _handed_bytes(self, sweep: Sweep) -> int:
        """What programs leave for the last one; and that one's, of channels, for the merge of a group."""
        merged = sweep.samples * sweep.values * sweep.view.channels if sweep.group > 1 else 0
        return (sweep.partials + merged) * self._wide


def group_norm(
    n: int, c: int, s: int, groups: int, itemsize: int, channels_last: bool,
    sms: int = 132, aligned: bool = True, epilogue: EpiloguePlan = NO_EPILOGUE_PLAN,
) -> GroupNormPlan:  # fmt: skip
    channels_last = channels_last or s == 1
    x = Problem(n, c, s, itemsize, channels_last, aligned, sms)

    def sweep(make: Callable[..., Sweep], by_group: bool, inputs: int, activation: str) -> Sweep:
        return swept(make, x, groups, by_group, inputs, activation)

    forward = held(x, groups, 1, kept=epilogue.kept) or (
        sweep(reduce_sweep, not channels_last, 1, "none"),
        sweep(map_sweep, False, 1 + epilogue.residual, epilogue.activation),
    )
    backward = held(x, groups, 2, epilogue.activation, epilogue.kept) or (
        sweep(reduce_sweep, False, 2 + (epilogue.kept == "residual"), epilogue.activation),
        sweep(map_sweep, False, 2, epilogue.activation_of_dx),
    )
    return GroupNormPlan(n, c, s, groups, itemsize, forward, backward, epilogue)
