"""Runs the sources that Inductor has made on tensors of the CPU: its own host code, allocations and grids,
and in place of each launch a function of the caller's."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bnfast.ptx.driver import TARGETS, fake_driver

TARGET = "sm_90"
Grid = tuple[int, int, int]
Launch = Callable[["Candidate"], None]
# What host code may ask of torch beside launches: nothing that would run on a GPU.
FREE = ("empty", "view", "as_strided", "detach", "alias", "reshape", "expand", "permute", "t.", "slice")


@dataclass(frozen=True)
class Candidate:
    """A launch in one of the configurations that Inductor would try. code: Triton's compiled kernel. given:
    its arguments by name. configuration: in words."""

    kernel: str
    code: Any
    grid: Grid
    given: dict[str, Any] = field(repr=False)
    configuration: str


class OnTheGPU(NotImplementedError):
    """Inductor's host code asks torch for an operation, which is not one of its kernels."""


class _LaunchesAlone(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        if not name.startswith(FREE):
            raise OnTheGPU(f"Inductor leaves {name} to ATen")
        return function(*args, **(kwargs or {}))


class Kernel:
    """One of Inductor's kernels. choose: is handed all configurations of a launch."""

    def __init__(self, name: str, source: str, choose: Callable[[list[Candidate]], None]) -> None:
        from torch._inductor.codecache import PyCodeCache

        self.name, self._choose = name, choose
        self._autotuner = getattr(PyCodeCache.load(source), name)

    def run(self, *arguments: Any, stream: int = 0) -> None:
        with _disable_current_modes():  # what the caller does is not the host code's
            self._choose([self._candidate(config, arguments) for config in self._autotuner.configs])

    def _candidate(self, config: Any, arguments: Sequence[Any]) -> Candidate:
        function, constants = self._autotuner.fn, config.kwargs
        free = [name for name in function.arg_names if name not in constants]
        by_name = {**dict(zip(free, arguments, strict=False)), **constants}
        code = self._compiled(config)
        given = {name: by_name[name] for name in code.src.signature if name in by_name}
        words = ", ".join(f"{name} {value}" for name, value in constants.items())
        return Candidate(
            self.name, code, self._grid(config, by_name), given, f"{words}, {config.num_warps} warps"
        )

    def _compiled(self, config: Any) -> Any:
        meta = self._autotuner._create_compile_meta(config)
        parts = meta["signature"], meta["constants"], meta["configs"][0]
        source = triton.compiler.ASTSource(self._autotuner.fn, *parts)
        options = self._autotuner._create_compile_options(config, meta)
        return triton.compile(source, target=TARGETS[TARGET], options=options)

    def _grid(self, config: Any, values: dict[str, Any]) -> Grid:
        """Its expressions are Python of Inductor's, in the names of the kernel's arguments."""
        from torch._inductor.runtime.triton_heuristics import GridExpr

        made, names = GridExpr.from_meta(self._autotuner.inductor_meta, config), dict(values)
        for line in made.prefix:
            exec(line, {}, names)
        x, y, z = (int(eval(str(e), {}, names)) for e in (made.x_grid, made.y_grid, made.z_grid))
        return x, y, z


@contextlib.contextmanager
def on_the_host(choose: Callable[[list[Candidate]], None]) -> Iterator[None]:
    """Within, sources of Inductor's can be loaded and called with tensors of the CPU."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers

    def allocated(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    def kernel(self: Any, name: str, source: str, device_str: str = "cuda") -> Kernel:
        return Kernel(name, source, choose)

    guards: Any = torch._C._dynamo.guards
    with (
        mock.patch.object(guards, "_empty_strided_cuda", allocated, create=True),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0),
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(AsyncCompile, "wait"),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        fake_driver(TARGET),
    ):
        yield


def call(source: str, given: Sequence[Tensor], choose: Callable[[list[Candidate]], None]) -> list[Any]:
    """What one of the sources makes of these. `choose` is in place of a launch, and may run any candidate."""
    with on_the_host(choose):
        module = types.ModuleType("generated")
        exec(compile(source, "generated", "exec"), module.__dict__)
        with _LaunchesAlone():
            return list(module.call([*given]))
