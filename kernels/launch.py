"""Launching compiled kernels with little host time, and the memory that outlives a launch.

`kernel[grid](...)` takes 10 us of Python a launch to bind arguments. A `Launch` belongs to one plan, one
set of dtypes and one device, so it binds once and then calls the compiled kernel's launcher directly (about
1 us). That call is private to Triton. The public one is used where the private one does not look as
expected, and while Triton's launch hooks are set."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from .records import ALONE, Overlap

INTERPRET: bool = triton.knobs.runtime.interpret
# Products may be contracted into sums. Every launch says so, because Triton's default changes with versions
# and environments, and a backward that recomputes relu's input must round as the forward did.
FP_FUSION = True
# Whether a launch that reads what the one before it leaves may start before that one has ended, on GPUs
# that can (programmatic dependent launch): off until a GPU has confirmed it.
OVERLAPS: bool = os.environ.get("BNFAST_PDL") == "1"
_runtime = triton.knobs.runtime
# Whether hooks may be set costs three truth values a launch: the functions in Triton's two chains, and what
# has replaced a default, perhaps a chain. Triton changes each of these in place.
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
    forbids: the first call may be a captured one. Loading enqueues nothing, so the graph does not contain
    it."""
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
    """Whether a launch hook is set, by a profiler for example. A hook is a chain of functions, which may be
    empty, or what has replaced it."""
    hooks = (_runtime.launch_enter_hook, _runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _can_overlap() -> bool:
    """Whether launches overlap: it was asked for, and the GPU is of compute capability 9.0 or higher."""
    if INTERPRET or not OVERLAPS:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


class Planned(Protocol):
    """A plan as a launch sees it: PassPlan, OnePassPlan or RowPlan."""

    @property
    def programs(self) -> int: ...
    @property
    def tile(self) -> Any: ...  # the kernel's T
    @property
    def geometry(self) -> Any: ...  # a NamedTuple of the kernel's integer arguments
    @property
    def warps(self) -> int: ...
    @property
    def registers(self) -> int: ...  # of a thread, at most


class Launch:
    """One kernel with its grid, sizes and compile-time constants fixed. It is called with the current
    stream's handle, the tensors (or None), their addresses, and the kernel's scalars, in its order.

    A kernel finds its arguments by its parameters' names: x_ptr is the tensor "x" of `tensors`, T is the
    plan's tile, an integer is the size of this name in the plan's geometry, a constant is in `constants`.

    tensors: the names of what a call hands over; the last one, "none", is None. rename: what the kernel calls
    otherwise, {its name: the call's}. without: the names of tensors that the kernel is not given; nor is it
    given what `tensors` does not name. overlap: with the launches of the same call, if OVERLAPS; none with
    counters waits. bind_once: the caller promises that all later calls have the dtypes, the Nones and the
    16-byte alignment of the first."""

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
        overlap: Overlap = ALONE,
    ) -> None:
        self._kernel, self._grid, self._bind_once = kernel, plan.programs, bind_once
        overlap = overlap if _can_overlap() else ALONE
        fixed = {**plan.geometry._asdict(), **constants, "T": plan.tile, "PDL": overlap}
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
        assert not overlap.waits or ("PDL" in tail and "semaphores" not in given), f"{kernel.__name__} waits"
        self._pick = itemgetter(*picks)
        self._tail = tuple(fixed[name] for name in tail)
        self._options: dict[str, int] = {"enable_fp_fusion": FP_FUSION}
        if not INTERPRET:
            target = driver.active.get_current_target()
            # the plan counts warps of 32 threads
            self._options["num_warps"] = max(1, plan.warps * 32 // target.warp_size)
            if target.backend == "cuda":
                self._options["maxnreg"] = plan.registers
            if overlap.waits:
                self._options["launch_pdl"] = True
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
        """Launches as Triton's users do, and binds, so that later launches are direct. It does not bind
        while hooks are set, because the code that they make Triton compile may not be the code to keep."""
        if INTERPRET:
            with _interpreting:
                self._kernel[(self._grid,)](*args)
            return
        with _loading_allowed():
            compiled = self._kernel[(self._grid,)](*args, **self._options)
        if self._bind_once and self._bound is None and not hooked() and _calling_convention_known():
            # compiled is kept alive: without it, Triton 3.8 and newer would unload the function
            function, metadata = compiled.function, compiled.packed_metadata
            self._bound = (compiled.run, self._grid, compiled, function, metadata, self._pick, self._tail)


# The partial results that a kept workspace has room for: large tensors need some 1e5, very many tiny samples
# more.
KEPT = 1 << 22
_workspaces: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}


def workspace(
    index: int, stream: int, acc_like: Tensor, partials: int, blocks: int, private: bool
) -> tuple[Tensor, Tensor]:
    """The memory that programs of one launch share: room for `partials` values of acc_like's dtype, on its
    device, and `blocks` int32 semaphores, which are 0, and which kernels leave at 0.

    Launches with counters do not overlap on one stream, so one workspace serves them all, whichever host
    thread they come from. A captured graph may be replayed on any stream, beside anything: it gets a
    workspace of its own, set to 0 in the graph. So does a caller that asks for a private one, and one whose
    workspace is too large to keep."""
    # in the interpreter, a program that fails would leave counts in a kept workspace
    if private or partials > KEPT or INTERPRET or is_capturing():
        return acc_like.new_empty(partials), torch.zeros(blocks, dtype=torch.int32, device=acc_like.device)
    cached = _workspaces.get((index, stream, acc_like.dtype))
    if cached is None or cached[0].numel() < partials or cached[1].numel() < blocks:
        if cached is not None:  # never smaller than before, or two layers would replace it in turns
            partials, blocks = max(partials, cached[0].numel()), max(blocks, cached[1].numel())
        semaphores = torch.zeros(max(blocks, 1024), dtype=torch.int32, device=acc_like.device)
        cached = (acc_like.new_empty(max(partials, 65536)), semaphores)
        _workspaces[index, stream, acc_like.dtype] = cached
    return cached
