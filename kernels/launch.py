"""Launching compiled kernels with little host time, and the memory that outlives a launch.

`kernel[grid](...)` spends 10 us of Python a launch on binding arguments. A `Launch` belongs to one plan,
one set of dtypes and one device, so it binds once and then calls the compiled kernel's launcher directly
(about 1 us). That call is private to Triton: where it does not look as expected, and while anybody wants to
be told of launches (Triton's launch hooks), the public one is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.runtime import driver

INTERPRET: bool = triton.knobs.runtime.interpret
# Products may be contracted into sums. Said at every launch, since Triton's own default changes with versions
# and environments: a backward that recomputes which elements relu let through rounds as the forward did.
FP_FUSION = True
_runtime = triton.knobs.runtime
# What there is to see of hooks, at the price of three truth values a launch: the functions in Triton's two
# chains, and all that was put in place of a default, a chain perhaps. Triton changes each of them in place.
_enter, _exit = type(_runtime).launch_enter_hook.calls, type(_runtime).launch_exit_hook.calls
_replaced = vars(_runtime)
_interpreting = threading.Lock()  # the interpreter patches Triton's language for all threads


def current_stream(index: int) -> int:
    """The raw handle of the current stream of a CUDA device."""
    return torch._C._cuda_getCurrentRawStream(index)


def is_capturing() -> bool:
    return torch._C._cuda_isCurrentStreamCapturing()


@contextlib.contextmanager
def _loading_allowed() -> Iterator[None]:
    """Lets this thread load a kernel's code while it captures a graph, which the default capture mode
    forbids: a first call may well be a captured one. Loading enqueues nothing, so the graph is none the
    wiser."""
    if torch.version.cuda is None or not is_capturing():
        yield
        return
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; receives the mode it replaces
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def _calling_convention_known() -> bool:
    """Whether the active driver's launcher takes what `Launch` passes: grid, stream, function, then
    Triton's four (metadata, launch metadata, two hooks), then the kernel's arguments. 3.6 collects the last
    two groups in *args, 3.7 names the four."""
    try:
        if driver.active.get_current_target().backend != "cuda":
            return False
        names = list(inspect.signature(driver.active.launcher_cls.__call__).parameters)
    except (ValueError, TypeError, AttributeError):
        return False
    four = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]
    start = ["self", "gridX", "gridY", "gridZ", "stream", "function"]
    return names in ([*start, "args"], [*start, *four, "args"])


def hooked() -> bool:
    """Whether somebody, a profiler say, asked Triton to be told of launches. A hook is a chain of functions,
    which may be empty, or what was put in its place."""
    hooks = (_runtime.launch_enter_hook, _runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


class Planned(Protocol):
    """What a launch needs to know of a plan: plan.Sweep, cell_plan.CellSweep, row_plan.RowSweep."""

    @property
    def programs(self) -> int: ...
    @property
    def tile(self) -> Any: ...  # the kernel's T
    @property
    def geometry(self) -> Any: ...  # a NamedTuple that has the kernel's integer arguments
    @property
    def warps(self) -> int: ...
    @property
    def registers(self) -> int: ...  # a thread, at most


class Launch:
    """One kernel with its grid, sizes and compile-time constants fixed. Called with the current stream's
    handle, the tensors (or None), their addresses, and the kernel's scalars, in its order.

    A kernel finds its arguments by its parameters' names: x_ptr is the tensor "x" of `tensors`, T the plan's
    tile, an integer the size of this name in the plan's geometry, a constant that of `constants`.

    tensors: the names of what a call hands over, of which the last, "none", is None. rename: what the kernel
    knows by another name, {its own: the call's}. without: what it is not given, nor what `tensors` does not
    name. bind_once: the caller vouches that dtypes, None-ness and 16-byte alignment of all tensors are those
    of the first call."""

    __slots__ = ("_bind_once", "_bound", "_grid", "_kernel", "_options", "_pick", "_tail")

    def __init__(
        self,
        kernel: Any,
        plan: Planned,
        tensors: Sequence[str],
        constants: Mapping[str, Any],
        bind_once: bool,
        *,
        rename: Mapping[str, str] | None = None,
        without: Collection[str] = (),
    ) -> None:
        self._kernel, self._grid, self._bind_once = kernel, plan.programs, bind_once
        fixed = {**plan.geometry._asdict(), **constants, "T": plan.tile}
        pointers = [name.removesuffix("_ptr") for name in kernel.arg_names if name.endswith("_ptr")]
        given = [(rename or {}).get(name, name) for name in pointers]
        picks = [
            tensors.index(to if name not in without and to in tensors else "none")
            for name, to in zip(pointers, given, strict=True)
        ]
        tail = [name for name in kernel.arg_names if name in fixed]
        head = kernel.arg_names[: len(kernel.arg_names) - len(tail)]
        assert kernel.arg_names == [*head, *tail], f"{kernel.__name__}: scalars come before sizes"
        assert {*(rename or ()), *without} <= {*pointers}, f"{kernel.__name__} takes {pointers}"
        self._pick = itemgetter(*picks)
        self._tail = tuple(fixed[name] for name in tail)
        self._options: dict[str, int] = {"enable_fp_fusion": FP_FUSION}
        if not INTERPRET:
            target = driver.active.get_current_target()
            # the plan counts warps of 32 threads
            self._options["num_warps"] = max(1, plan.warps * 32 // target.warp_size)
            if target.backend == "cuda":
                self._options["maxnreg"] = plan.registers
        self._bound: Any = None  # what a direct launch needs, set in one go: other threads may be looking

    def __call__(
        self, stream: int, tensors: Sequence[Tensor | None], addresses: Sequence[int | None], *scalars: float
    ) -> None:
        bound = self._bound
        if bound is None or ((_enter or _exit or _replaced) and hooked()):
            self._publicly((*self._pick(tensors), *scalars, *self._tail))
            return
        run, grid, compiled, function, metadata, pick, tail = bound
        # addresses: given a tensor, Triton's launcher asks the driver where it lies
        run(grid, 1, 1, stream, function, metadata, None, None, None, *pick(addresses), *scalars, *tail)

    def _publicly(self, args: tuple[Any, ...]) -> None:
        """By Triton's own launch, after which there is one without it. Not while hooks are set: the code that
        they ask for may be none to keep."""
        if INTERPRET:
            with _interpreting:
                self._kernel[(self._grid,)](*args)
            return
        with _loading_allowed():
            compiled = self._kernel[(self._grid,)](*args, **self._options)
        if self._bind_once and self._bound is None and not hooked() and _calling_convention_known():
            # compiled is there to stay: with it, Triton 3.8 and newer would unload the function
            function, metadata = compiled.function, compiled.packed_metadata
            self._bound = (compiled.run, self._grid, compiled, function, metadata, self._pick, self._tail)


KEPT = (
    1 << 22
)  # values: a step over x as it should be hands over some 1e5; tiny samples in great number, more
_workspaces: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}


def workspace(
    index: int, stream: int, seed: Tensor, partials: int, blocks: int, own: bool
) -> tuple[Tensor, Tensor]:
    """What programs of one launch hand each other: room for `partials` values of seed's dtype, on its device,
    and `blocks` zeroed int32 counters, which kernels leave at zero.

    Launches on one stream do not overlap, so one workspace serves them all, whichever host thread they come
    from. A captured graph may be replayed on any stream, beside anything: it gets its own, zeroed in it, as
    does a caller that asks for its `own`, and one whose workspace is too large to keep."""
    # in the interpreter, a program that fails would leave a kept one dirty
    if own or partials > KEPT or INTERPRET or is_capturing():
        return seed.new_empty(partials), torch.zeros(blocks, dtype=torch.int32, device=seed.device)
    cached = _workspaces.get((index, stream, seed.dtype))
    if cached is None or cached[0].numel() < partials or cached[1].numel() < blocks:
        if cached is not None:  # never smaller than it was, or two layers would take turns to replace it
            partials, blocks = max(partials, cached[0].numel()), max(blocks, cached[1].numel())
        counters = torch.zeros(max(blocks, 1024), dtype=torch.int32, device=seed.device)
        cached = _workspaces[index, stream, seed.dtype] = (seed.new_empty(max(partials, 65536)), counters)
    return cached
