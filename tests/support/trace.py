"""What interpreted kernels do to memory: traffic per tensor, stray accesses, races.

    with trace(x=x) as t:
        y = layer(x)
    assert t["x"].reads == 2.0 and t.of(y).writes == 1.0 and not t.out_of_bounds and not t.hazards

Tensors the traced call allocates are adopted, under the kernel's name for them, when they reach a kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from .races import Access, Program, Races

SECTOR = 32  # bytes; the unit in which a GPU's L2 moves data


@dataclass
class Flow:
    """Traffic in one direction, summed over operations."""

    touched: np.ndarray = field(repr=False)  # whether each byte was, at least once
    requested: int = 0  # bytes, each lane counted
    distinct: int = 0  # bytes, each counted once an operation
    sectors: int = 0  # distinct sectors an operation

    @property
    def efficiency(self) -> float:
        """Useful share, at most 1, of the sectors that were moved; NaN if there were none."""
        return self.distinct / (SECTOR * self.sectors) if self.sectors else float("nan")


class Traffic:
    """Everything that happened to the bytes [start, stop) of memory. Sizes in bytes; size: of the tensor as
    its user sees it, numel * itemsize."""

    def __init__(self, name: str, start: int, stop: int, size: int) -> None:
        self.name, self.start, self.stop, self.size = name, start, stop, size
        self.read, self.write = (Flow(np.zeros(stop - start, bool)) for _ in range(2))
        self.atomics = 0  # lanes

    # bytes read or written, in multiples of the tensor's size
    reads = property(lambda self: self.read.requested / self.size)
    writes = property(lambda self: self.write.requested / self.size)
    # bytes read or written at least once
    unique_read = property(lambda self: int(self.read.touched.sum()))
    unique_written = property(lambda self: int(self.write.touched.sum()))
    read_efficiency = property(lambda self: self.read.efficiency)
    write_efficiency = property(lambda self: self.write.efficiency)


@dataclass(frozen=True)
class Stray:
    """Lanes of one operation that fell outside every known tensor. They are counted, and not carried out."""

    kernel: str
    program: Program
    access: Access
    lanes: int
    nearest: str  # where the first of them is: "y +64" is 64 bytes from the start of y


@dataclass(frozen=True)
class Hazard:
    """The outcome of a launch depends on the order of its programs, or of lanes. Reported once a tensor."""

    kernel: str
    launch: int
    tensor: str
    race: str  # "load/store": a load not ordered after another program's store; "lanes": within one store


class Trace:
    """The record of a traced call; filled by `trace`."""

    def __init__(self) -> None:
        self.launches: int = 0
        self.out_of_bounds: list[Stray] = []
        self.hazards: list[Hazard] = []
        self.traffic: dict[str, Traffic] = {}
        # Ranges by rising address; the first is a sentinel below every address.
        self._ranges: list[Traffic] = [Traffic("nothing", 0, 0, 0)]
        # No address may be used twice in one trace. To hold tensors would make autograd copy gradients.
        self._alive: list[torch.UntypedStorage] = []
        self._kernel: str = ""
        self._races: Races = Races()

    def __getitem__(self, name: str) -> Traffic:
        return self.traffic[name]

    def of(self, tensor: torch.Tensor) -> Traffic:
        """The traffic of a tensor, or of a view's base, by its address."""
        traffic = self._owner(tensor.data_ptr())
        if traffic is None:
            raise KeyError("no traced kernel was given this tensor")
        return traffic

    def moved(self, *names: str) -> int:
        """Bytes read and written of the tensors that go by these names, as given here or in the kernels."""
        known = {*names, *(f"{name}_ptr" for name in names)} & self.traffic.keys()
        return sum(self[name].read.distinct + self[name].write.distinct for name in known)

    def adopt(self, name: str, tensor: torch.Tensor) -> None:
        """Watch the bytes of a tensor. A second name for the same bytes is an alias."""
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start, stop = tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()
        owner = self._owner(start)
        if owner is None or (owner.start, owner.stop) != (start, stop):
            for other in self._ranges:
                if other.start < stop and start < other.stop:
                    raise ValueError(f"{name} overlaps {other.name}; trace the tensor they are views of")
            owner = Traffic(name, start, stop, tensor.nbytes)
            self._ranges = sorted([*self._ranges, owner], key=lambda r: r.start)
        self._alive.append(tensor.untyped_storage())
        self.traffic[name] = owner

    def _owner(self, address: int) -> Traffic | None:
        return next((r for r in self._ranges if r.start <= address < r.stop), None)

    def _enter_launch(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.launches += 1
        self._kernel = kernel
        self._races = Races()
        for name, argument in arguments.items():
            if (
                isinstance(argument, torch.Tensor)
                and argument.numel()
                and not self._owner(argument.data_ptr())
            ):
                names = (name, *(f"{name}.{n}" for n in range(2, len(self.traffic) + 3)))
                self.adopt(next(n for n in names if n not in self.traffic), argument)

    def _access(self, access: Access, pointers: TensorHandle, mask: Any) -> TensorHandle:
        """Record one operation; returns its mask without the lanes that are out of bounds."""
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        mask = np.asarray(mask.data if isinstance(mask, TensorHandle) else mask)
        lanes = np.broadcast_to(mask.astype(bool), pointers.data.shape).copy()  # may come as integers
        addresses = pointers.data[lanes].astype(np.int64)
        starts, stops = np.array([(r.start, r.stop) for r in self._ranges]).T
        owner = np.searchsorted(starts, addresses, side="right") - 1
        inside = addresses + itemsize <= stops[owner]
        for index in np.unique(owner[inside]):
            self._count(self._ranges[index], access, addresses[inside & (owner == index)], itemsize)
        if not inside.all():
            stray = addresses[~inside]
            near = min(self._ranges, key=lambda r: min(abs(r.start - stray[0]), abs(r.stop - stray[0])))
            where = f"{near.name} {stray[0] - near.start:+d}"
            self.out_of_bounds.append(Stray(self._kernel, _program(), access, stray.size, where))
            lanes[lanes] = inside
        return TensorHandle(lanes, tl.int1)

    def _count(self, traffic: Traffic, access: Access, addresses: np.ndarray, itemsize: int) -> None:
        elements = np.unique(addresses)
        offsets = ((elements - traffic.start)[:, None] + np.arange(itemsize)).ravel()
        if access == "atomic":
            traffic.atomics += addresses.size
        else:
            flow = traffic.read if access == "load" else traffic.write
            flow.requested += addresses.size * itemsize
            flow.distinct += elements.size * itemsize
            flow.sectors += np.unique(elements // SECTOR).size
            flow.touched[offsets] = True
        if access == "store" and elements.size < addresses.size:
            self._report(traffic, "lanes")
        size = traffic.stop - traffic.start
        for earlier in self._races.access(traffic.start, size, offsets, access, _program()):
            self._report(traffic, f"{access}/{earlier}")

    def _report(self, traffic: Traffic, race: str) -> None:
        hazard = Hazard(self._kernel, self.launches, traffic.name, race)
        if hazard not in self.hazards:
            self.hazards.append(hazard)

    def _atomic(self, pointers: TensorHandle, mask: Any, semantic: Any) -> TensorHandle:
        lanes = self._access("atomic", pointers, mask)
        self._races.synchronise(
            np.unique(pointers.data[lanes.data]),
            _program(),
            acquires=semantic.name in ("ACQUIRE", "ACQUIRE_RELEASE"),
            releases=semantic.name in ("RELEASE", "ACQUIRE_RELEASE"),
        )
        return lanes


def _program() -> Program:
    return interpreter.interpreter_builder.grid_idx


@contextlib.contextmanager
def trace(**tensors: torch.Tensor | None) -> Iterator[Trace]:
    """Trace every interpreted kernel launched inside; `tensors` are known beforehand, under these names."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("only interpreted kernels can be traced: import them under TRITON_INTERPRET=1")
    record = Trace()
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel():
            record.adopt(name, tensor)

    # what stands before each of the interpreter's methods: it takes its arguments, and returns those to go by
    def masked_load(pointers, mask, *rest):
        return pointers, record._access("load", pointers, mask), *rest

    def masked_store(pointers, value, mask, *rest):
        return pointers, value, record._access("store", pointers, mask), *rest

    def atomic_rmw(operation, pointers, value, mask, semantic, scope):
        return operation, pointers, value, record._atomic(pointers, mask, semantic), semantic, scope

    def barrier():
        record._races.barrier(_program())
        return ()

    def preceded(original: Callable[..., Any], before: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        return lambda self, *arguments, **options: original(self, *before(*arguments), **options)

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call = executor.__call__

    def traced_call(self, *arguments, **keywords):
        names = dict(zip(self.arg_names, arguments, strict=False)) | keywords
        record._enter_launch(self.fn.__name__, names)
        return call(self, *arguments, **keywords)

    with contextlib.ExitStack() as stack:
        for before in (masked_load, masked_store, atomic_rmw, barrier):
            name = f"create_{before.__name__}"
            stack.enter_context(mock.patch.object(builder, name, preceded(getattr(builder, name), before)))
        stack.enter_context(mock.patch.object(executor, "__call__", traced_call))
        yield record


def clean(t: Trace, launches: int | None = None) -> None:
    """No access beside a tensor, no race, and so many launches, where that is known."""
    assert not t.out_of_bounds, t.out_of_bounds
    assert not t.hazards, t.hazards
    assert t.launches == launches or launches is None
