"""What torch.compile generates for an H200, on any machine: TorchInductor's own source, made and not run.

    python3 -m benchmarks.inductor < requests > answers

Autograd cannot trace tensors of a GPU that is not there, but those of torch's meta device it can. So a case
is traced on the meta device, and moves to a made-up GPU before Inductor looks at it: the graphs, the choices
and the code are those that a GPU of this kind would get, with Inductor's default options. This patches torch
in many places, and so it has a process of its own (`generated`).

A request is a line of JSON: a case's columns, as `Request` has them; so is its answer: the sources of the
forward and the backward, or why there are none."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ROOT
from codegen import SMS
from codegen.cases import DTYPES, NAMES, Case

EPS, MOMENTUM = 1e-5, 0.1
SOURCES = 2  # a forward and a backward
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "leaky_relu": F.leaky_relu,
}  # fmt: skip
H200 = types.SimpleNamespace(
    name="NVIDIA H200", type="cuda", index=0, major=9, minor=0, cc=90, multi_processor_count=SMS,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    warp_size=32, total_memory=141 << 30, shared_memory_per_block=48 << 10, gcnArchName="",
    shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A case as JSON can hold it."""

    norm: str
    shape: tuple[int, ...]
    groups: int
    dtype: str
    channels_last: bool
    activation: str | None
    residual: bool

    @classmethod
    def of(cls, case: Case) -> Request:
        after = case.activation, case.residual
        return cls(case.norm, case.shape, case.groups, NAMES[case.dtype], case.channels_last, *after)

    @property
    def case(self) -> Case:
        shape, dtype = tuple(self.shape), DTYPES[self.dtype]
        after = self.activation, self.residual
        return Case(self.norm, shape, self.groups, dtype, self.channels_last, *after)


def names(case: Case) -> list[str]:
    """Of the inputs of `expression`, in order."""
    running = ["running_mean", "running_var"] * (case.norm == "BatchNorm")
    return ["x", "weight", "bias", *running, *(["z"] * case.residual)]


def parameter_dtype(case: Case) -> torch.dtype:
    """fp32 for BatchNorm; other norms of torch take x's dtype alone on a GPU."""
    return torch.float32 if case.norm == "BatchNorm" else case.dtype


def normalized(case: Case, x: Tensor, weight: Tensor, bias: Tensor, running: list[Tensor]) -> Tensor:
    if case.norm == "BatchNorm":
        mean, var = running
        return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)
    if case.norm == "LayerNorm":
        return F.layer_norm(x, case.shape[-1:], weight, bias, EPS)
    return F.group_norm(x, case.groups, weight, bias, EPS)


def expression(case: Case) -> Callable[..., Tensor]:
    """act(norm(x) + z) of torch.nn's functions, as a function of `names` in their order."""

    def of(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        running, z = list(rest[:2]), rest[-1] if case.residual else None
        y = normalized(case, x, weight, bias, running)
        y = y if z is None else y + z
        return ACTIVATIONS[case.activation](y) if case.activation else y

    return of


def traced(case: Case) -> torch.fx.GraphModule:
    """The expression as a graph, as torch.compile takes it from Python."""
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    inputs: list[Any] = [torch.fx.Proxy(graph.placeholder(name), tracer) for name in names(case)]
    result: Any = expression(case)(*inputs)
    graph.output(result.node)
    return torch.fx.GraphModule({}, graph)


def empty(case: Case, device: str) -> list[Tensor]:
    """The inputs of `expression`; those that a gradient is taken of require one."""
    found = []
    for name in names(case):
        if name in ("x", "z"):
            t = torch.empty(case.shape, dtype=case.dtype, device=device, memory_format=case.memory_format)
        else:
            size = case.shape[-1] if case.norm == "LayerNorm" else case.shape[1]
            kind = torch.float32 if name.startswith("running") else parameter_dtype(case)
            t = torch.empty(size, dtype=kind, device=device)
        found.append(t.requires_grad_(not name.startswith("running")))
    return found


def generated(cases: Iterable[Case]) -> Iterator[list[str] | str]:
    """For each case the sources that Inductor makes, [forward, backward], or a line that says why not."""
    command = [sys.executable, "-m", "benchmarks.inductor"]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    pipes["stderr"] = subprocess.DEVNULL  # warnings; errors are answers
    with subprocess.Popen(command, cwd=ROOT, env=variables, text=True, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for case in cases:
            try:
                print(json.dumps(asdict(Request.of(case))), file=child.stdin, flush=True)
                answer = child.stdout.readline()
            except BrokenPipeError:
                answer = ""
            yield json.loads(answer) if answer else "the process that asks Inductor has ended"
        child.stdin.close()


# What follows runs in that process.


@contextlib.contextmanager
def made_up_gpu() -> Iterator[None]:
    """Within, torch and Triton find an H200."""
    from torch._dynamo import device_interface

    from bnfast.ptx.driver import fake_driver

    answers: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: False, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_properties": lambda device=None: H200,
        "get_device_capability": lambda device=None: (H200.major, H200.minor),
        "is_bf16_supported": lambda *args, **options: True, "synchronize": lambda device=None: None,
        "set_device": lambda device: None, "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0, "_lazy_init": lambda: None,
        "get_rng_state": lambda *given: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *given: None,
    }  # fmt: skip
    interface, workers = device_interface.CudaInterface, device_interface.caching_worker_device_properties
    current = device_interface.caching_worker_current_devices
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            if hasattr(interface, name):
                stack.enter_context(mock.patch.object(interface, name, staticmethod(answer)))
        for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream"):
            stack.enter_context(mock.patch.object(interface, name, staticmethod(lambda device: 0)))
        stack.enter_context(mock.patch.dict(workers, {"cuda": [H200]}))
        stack.enter_context(mock.patch.dict(current, {"cuda": 0}))
        stack.enter_context(mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
        stack.enter_context(fake_driver())
        yield


def moved(value: Any) -> Any:
    """A tensor of the meta device as one of the made-up GPU, both fakes of one mode."""
    if not isinstance(value, Tensor) or value.device.type != "meta":
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")


def move(graph: torch.fx.Graph) -> None:
    """Puts a traced graph on the made-up GPU."""
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta["val"])
        if str(node.kwargs.get("device")) == "meta":
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}


def generate(case: Case) -> list[str]:
    """The sources of a case's forward and backward."""
    from torch._functorch import config as functorch_config
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode

    sources: list[str] = []

    def not_loaded(self: Any, code: Any) -> Any:
        sources.append(code.value)
        module = types.ModuleType("generated")
        module.__dict__.update(__file__="generated.py", call=lambda given: None, key="", runner=None)
        return module

    def inner(graph: torch.fx.GraphModule, given: list[Any], **options: Any) -> Any:
        with made_up_gpu():
            return compile_fx.compile_fx_inner(graph, [moved(each) for each in given], **options)

    inductor_options = {
        "force_disable_caches": True, "compile_threads": 1, "joint_custom_pre_pass": move,
        "joint_graph_constant_folding": False,  # it would run operations on the GPU
    }  # fmt: skip
    functorch_options = {
        "enable_autograd_cache": False, "force_non_lazy_backward_lowering": True,
        "fake_tensor_allow_meta": True,
    }  # fmt: skip
    with functorch_config.patch(functorch_options), config.patch(inductor_options):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = empty(case, "meta")
        with (
            mock.patch.object(GraphLowering, "_compile_to_module_lines", not_loaded),
            tracing(TracingContext(mode)),
        ):
            compile_fx.compile_fx(traced(case), given, inner_compile=inner)
    if len(sources) != SOURCES:
        raise RuntimeError(f"Inductor made {len(sources)} sources, not a forward and a backward")
    return sources


def main() -> None:
    """Answers requests until there are no more. What torch prints goes to stderr."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            answer: list[str] | str
            try:
                answer = generate(Request(**json.loads(line)).case)
            except Exception as e:  # whatever a version of torch does otherwise than the one before
                why = (str(e).strip().splitlines() or [""])[0]
                answer = f"{type(e).__name__}: {why} (PyTorch {torch.__version__}; 2.15 is known to work)"
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
