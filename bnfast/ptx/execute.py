"""Runs bnfast's own host code with launches that execute the compiled kernel's PTX: plans, arguments,
workspaces and autograd are those of a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest import mock

import numpy as np
import triton
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend

from ..kernels.launch import INTERPRET
from .driver import launching
from .library import load
from .program import Program, UnknownInstruction
from .traffic import Traffic

TENSOR = np.dtype([
    ("base", "u8"), ("bytes", "u8"), ("granule", "i4"), ("kind", "i4"), ("touched", "u8"), ("moved", "i8", 6),
])  # fmt: skip
READ_ONLY, MADE, UPDATED, UNWATCHED = range(4)
# What a launch may do with a tensor, by the name of the kernel's parameter. All others are MADE: if a launch
# stores to one, it may load from there only what it has stored.
_KINDS = dict.fromkeys(("x_ptr", "dy_ptr", "residual_ptr", "weight_ptr", "bias_ptr"), READ_ONLY)
_KINDS |= dict.fromkeys(("running_mean_ptr", "running_var_ptr", "batches_ptr", "semaphores_ptr"), UPDATED)
COUNTERS = (
    "executed", "sectors", "fewest_sectors", "fetched", "wavefronts", "fewest_wavefronts", "diverged",
)  # fmt: skip
TOTALS = ("replicas", "round_trips", "final_round_trips", "barriers")
_MESSAGES = 8192  # bytes
Grid = tuple[int, int, int]
_FLOATS = {"fp32": "<f", "fp64": "<d"}  # how struct packs scalars


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in (
            "length", "registers", "warps", "shared_bytes", "shared_step", "grid", "resident", "quantum",
            "grid_x", "grid_y", "programs", "cached", "sms", "counting", "racing", "dependent",
            "n_unfinished",
        )),
        *((name, ctypes.c_void_p) for name in (
            "chosen", "initial", "parameters", "unfinished", "tensors",
        )),
        *((name, ctypes.c_int32) for name in ("n_tensors", "messages_room")),
        *((name, ctypes.c_uint64) for name in ("seed", "perturb")),
        *((name, ctypes.c_void_p) for name in ("counters", "totals", "messages")),
    ]  # fmt: skip


class Fault(AssertionError):
    """A launch did what a kernel must not do."""


@dataclass
class Execution:
    """One launch. counters: of each instruction, by the names of COUNTERS. tensors: by the kernel's
    parameters, of which two may be given the same.

    totals: replicas: stores by one warp of a program of what another has stored or loaded without a barrier
    between them, where both have the same value or the tensor is updated in place; round_trips: how often a
    warp at most waits for what it has loaded, each time after the last; final_round_trips: those after the
    first atomic; barriers: the most that a program passes."""

    kernel: str
    grid: int
    program: Program
    instructions: int
    counters: dict[str, np.ndarray]
    totals: dict[str, int]
    tensors: dict[str, Traffic]
    dependent: bool = False  # whether it may start before the launch before it has ended

    def count(self, counter: str) -> int:
        return int(self.counters[counter].sum())


@dataclass
class Arguments:
    """What a kernel is handed: 64 bits of each parameter, and the memory that it may touch."""

    parameters: list[int] = field(default_factory=list)
    watched: list[tuple[int, int, int, int, Any]] = field(default_factory=list)
    tensors: dict[str, int] = field(default_factory=dict)  # by the parameters' names: which of `watched`
    written: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, code: Any, given: dict[str, Any], watched: bool = True) -> Arguments:
        """Those of a launch of what Triton has compiled. watched: whether what it does with its tensors is
        judged; their bounds always are."""
        arguments = cls()
        for name, value in given.items():
            kind = code.src.signature[name]
            if kind != "constexpr":
                arguments.add(name, kind, value, watched)
        return arguments

    def add(self, name: str, kind: str, value: Any, watched: bool = True) -> None:
        if not isinstance(value, Tensor):
            self.parameters.append(_scalar(name, kind, value))
            return
        if value.device.type != "cpu":
            raise TypeError(f"{name} is on {value.device}; only tensors of the CPU can be executed on")
        self.parameters.append(value.data_ptr())
        use = _KINDS.get(name, MADE) if watched else UNWATCHED
        span = value.data_ptr(), _extent(value)
        if value.numel() and self.watch(name, *span, value.element_size(), use, value.untyped_storage()):
            self.written += [value] * (use != READ_ONLY)

    def watch(self, name: str, address: int, size: int, element: int, use: int, storage: Any = None) -> bool:
        """Lets the kernel touch this memory. False: another parameter has brought the same. Otherwise only
        inputs may overlap."""
        for k, (base, length, *_) in enumerate(self.watched):
            if (base, length) == (address, size):
                self.tensors[name] = k
                return False
        for base, length, _, other, _ in self.watched:
            if base < address + size and address < base + length and not use == other == READ_ONLY:
                raise ValueError(f"the tensor of {name} overlaps another one")
        self.tensors[name] = len(self.watched)
        self.watched.append((address, size, element, use, storage))
        return True


def _extent(t: Tensor) -> int:
    """Bytes from the first element to behind the last, with what strides leave out."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() if t.numel() else 0


def _scalar(name: str, kind: str, value: Any) -> int:
    """The bits of a parameter, an integer's with its sign in all 64."""
    if kind in _FLOATS:
        return int.from_bytes(struct.pack(_FLOATS[kind], value), "little")
    if not re.fullmatch(r"[iu]\d+", kind):
        raise TypeError(f"{name} is a scalar of type {kind}, which the executor cannot hand to a kernel")
    return int(value) % 2**64


def run(
    program: Program,
    name: str,
    grid: int | Grid,
    shared: int,
    arguments: Arguments,
    seed: int,
    *,
    resident: int = 8,
    perturb: int = 0,
    only: Sequence[int] | None = None,
    counting: bool = True,
    racing: bool = False,
    cached: tuple[int, int] = (512, 0),
    after: Sequence[Execution] | None = None,
) -> Execution:
    """Executes one launch.

    grid: programs, in one or three dimensions. shared: bytes of shared memory. resident: programs that run at
    a time. only: the programs that are executed, numbered along the grid's first dimension first; None: all.
    counting: whether what is moved of each tensor is counted. racing: whether warps and lanes may store
    different values in one place of shared memory, since any of them will do. cached: sectors of an L1, and
    over how many of them programs are dealt out in turn; 0: each program has one. after: the launches that
    may still run when this one starts; None: it starts when all have ended."""
    sizes = (grid, 1, 1) if isinstance(grid, int) else grid
    grid = prod(sizes)
    for number, place in program.parameters.items():
        if number >= len(arguments.parameters):
            raise UnknownInstruction(f"{place}: {name} is handed {len(arguments.parameters)} parameters")
    chosen = np.array(range(grid) if only is None else only, np.int32)
    traffic = [
        Traffic(address, size, np.zeros(size // element, np.uint8), np.zeros(6, np.int64), storage)
        for address, size, element, _, storage in arguments.watched
    ]
    rows = [
        (t.address, t.size, element.bit_length() - 1, use, t.touched.ctypes.data, t.moved)
        for t, (_, _, element, use, _) in zip(traffic, arguments.watched, strict=True)
    ]
    stored = [(t.address, t.size) for each in after or () for t in each.tensors.values() if t.unique_written]
    spans: np.ndarray = np.array(stored, np.uint64)
    given = [
        program.code,
        program.initial,
        np.array(arguments.parameters, np.uint64),
        np.array(rows, TENSOR),
    ]
    counters: np.ndarray = np.zeros((len(program.code), len(COUNTERS)), np.int64)
    totals: np.ndarray = np.zeros(len(TOTALS), np.int64)
    messages = ctypes.create_string_buffer(_MESSAGES)
    code, initial, parameters, tensors = (array.ctypes.data for array in given)
    launch = _Launch(
        code=code, length=len(program.code), registers=len(program.initial), warps=program.warps,
        shared_bytes=shared, shared_step=program.shared_step, grid=grid, resident=min(resident, len(chosen)),
        quantum=64, initial=initial, parameters=parameters, tensors=tensors, n_tensors=len(rows),
        messages_room=_MESSAGES, seed=seed, perturb=perturb, counters=counters.ctypes.data,
        totals=totals.ctypes.data, messages=ctypes.addressof(messages), programs=len(chosen),
        chosen=chosen.ctypes.data, cached=cached[0], sms=cached[1], counting=counting, racing=racing,
        grid_x=sizes[0], grid_y=sizes[1], dependent=after is not None, n_unfinished=len(stored),
        unfinished=spans.ctypes.data,
    )  # fmt: skip
    instructions = load().execute(ctypes.byref(launch))
    if messages.value:
        raise Fault(f"{name}, schedule {seed}:\n{messages.value.decode()}")
    for t, row in zip(traffic, given[-1], strict=True):
        t.moved = row["moved"]
    return Execution(
        name, grid, program, instructions,
        counters=dict(zip(COUNTERS, counters.T, strict=True)),
        totals=dict(zip(TOTALS, totals.tolist(), strict=True)),
        tensors={parameter: traffic[k] for parameter, k in arguments.tensors.items()},
        dependent=after is not None,
    )  # fmt: skip


def program_of(code: Any) -> Program:
    """The instructions of what Triton has compiled, read once."""
    program = _programs.get(code.hash)
    if program is None:
        program = _programs[code.hash] = Program(code.asm["ptx"])
    return program


def _bits(t: Tensor) -> bytes:
    """All of the memory between a tensor's first and last element."""
    return ctypes.string_at(t.data_ptr(), t.nbytes)


def _execute(
    name: str, code: Any, grid: int, given: dict[str, Any], seeds: Sequence[int], perturb: int,
    ahead: Sequence[Execution],
) -> Execution:  # fmt: skip
    """Executes a launch once for each schedule. All have to give the same bits. ahead: the launches that may
    still run when it starts, if it is made so that it does not wait for them."""
    program = program_of(code)
    arguments = Arguments.of(code, given)
    before = [_bits(t) for t in arguments.written]
    first, after = None, ahead if code.metadata.launch_pdl else None
    for seed in seeds:
        for t, bits in zip(arguments.written, before, strict=True):
            ctypes.memmove(t.data_ptr(), bits, len(bits))  # autograd sees no new version
        last = seed == seeds[-1]
        done = run(
            program, name, grid, code.metadata.shared, arguments, seed,
            perturb=perturb, counting=last, after=after,
        )  # fmt: skip
        result = [_bits(t) for t in arguments.written]
        if result != (first := first or result):
            raise Fault(f"{name}: schedule {seed} gives other bits than schedule {seeds[0]}")
    semaphores = given.get("semaphores_ptr")
    if semaphores is not None and bool(semaphores.any()):
        raise Fault(f"{name} leaves counts in its semaphores")
    return done


_programs: dict[str, Program] = {}


@contextlib.contextmanager
def executing(*, sms: int = 2, seeds: Sequence[int] = (1,), perturb: int = 0) -> Iterator[list[Execution]]:
    """Within, bnfast's layers run their compiled kernels on CPU tensors.

    Args:
        sms: The number of multiprocessors that launches are planned for.
        seeds: Each is a schedule: an order of programs and warps. All have to give the same bits.
        perturb: Not 0: approximate instructions give any result within their documented error, always the
            same for the same operands; another number, another result.

    Returns:
        A context manager that gives a list, which grows by an Execution with each launch. As long as it is
        kept, so is the memory of the tensors.

    Raises:
        Fault: A launch did what a kernel must not do.
        MissingCompiler: There is no C compiler.
        RuntimeError: TRITON_INTERPRET is set.
        ValueError: There is no seed."""
    if not len(seeds):
        raise ValueError("seeds: at least one is needed, since each is an execution")
    if INTERPRET:
        raise RuntimeError("under TRITON_INTERPRET=1 Triton compiles no kernel to execute; unset it")
    load()
    found: list[Execution] = []
    ahead: list[Execution] = []  # since the last launch that waited to start

    def note(kernel: str, programs: int, arguments: dict[str, Any], compiled: Callable[[], Any]) -> None:
        done = _execute(kernel, compiled(), programs, arguments, seeds, perturb, ahead)
        if not done.dependent:
            ahead.clear()
        ahead.append(done)
        found.append(done)

    # Machine code is not looked at. Triton's own cache must not keep kernels that lack it.
    cache = {"TRITON_CACHE_DIR": f"{triton.knobs.cache.dir.removesuffix('-executed')}-executed"}
    with (
        mock.patch.dict(os.environ, cache),
        mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
        launching(note, sms),
    ):
        yield found
