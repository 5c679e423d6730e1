"""BatchNorm with what surrounds it as one cuDNN graph a direction, through NVIDIA's nvidia-cudnn-frontend:

forward   x -> batchnorm -> (+ z) -> (relu -> y > 0, a mask)
backward  dy -> (* mask, which is dz) -> batchnorm_backward

Written from its documentation and samples (samples/cpp/norm/batchnorm.cpp, test/python/test_batchnorm.py of
github.com/NVIDIA/cudnn-frontend), and tested with a stand-in for the package: not run on a GPU yet. For which
of these graphs a machine's cuDNN has engines shows when they are built."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import EPS, MOMENTUM, Baseline, Contender, given, lacks
from codegen.cases import NAMES, Case

PACKAGE = "cudnn"
TYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """A graph that is ready to run. named: its tensors. constants: what it takes besides, numbers from the
    host but for the zeros of `forward`."""

    graph: Any
    named: dict[str, Any]
    constants: Buffers
    workspace: Tensor
    handle: Any

    @property
    def reads_zeros(self) -> bool:
        """Of x's size, which costs T bytes more."""
        return any(t.numel() > 1 for t in self.constants.values())

    def run(self, buffers: Buffers) -> None:
        """On torch's stream. buffers: a tensor for each name, written to where it is an output."""
        stream = torch.cuda.current_stream(self.workspace.device).cuda_stream
        import_module(PACKAGE).set_stream(handle=self.handle, stream=stream)
        given = {self.named[name]: t.detach() for name, t in (buffers | self.constants).items()}
        self.graph.execute(given, self.workspace, handle=self.handle)


class Draft:
    """A graph that is being written. Sums and statistics are fp32 whatever x is."""

    def __init__(self, case: Case, handle: Any) -> None:
        self.cudnn = import_module(PACKAGE)
        self.case, self.handle = case, handle
        self.io = getattr(self.cudnn.data_type, TYPES[case.dtype])
        self.wide = self.cudnn.data_type.FLOAT
        self.graph = self.cudnn.pygraph(
            io_data_type=self.io, intermediate_data_type=self.wide, compute_data_type=self.wide, handle=handle
        )
        x = torch.empty(case.shape, device="meta", memory_format=case.memory_format)
        self.dim, self.stride = list(x.shape), list(x.stride())
        self.named: dict[str, Any] = {}
        self.constants: Buffers = {}

    def like_x(self, name: str, kind: Any = None) -> Any:
        return self._tensor(name, self.dim, self.stride, kind or self.io)

    def vector(self, name: str) -> Any:
        """[C], as [1, C, 1, 1]."""
        channels, rest = self.case.shape[1], len(self.case.shape) - 2
        return self._tensor(name, [1, channels, *[1] * rest], [channels, 1, *[channels] * rest], self.wide)

    def _tensor(self, name: str, dim: list[int], stride: list[int], kind: Any) -> Any:
        self.named[name] = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=kind)
        return self.named[name]

    def number(self, name: str, value: float) -> Any:
        """Given by value: a tensor of one element on the host."""
        self.constants[name] = torch.full([1] * len(self.case.shape), value)
        self.named[name] = self.graph.tensor_like(self.constants[name])
        return self.named[name]

    def gives(self, name: str, tensor: Any, kind: Any) -> None:
        self.named[name] = tensor.set_output(True).set_data_type(kind)

    def gives_like_x(self, name: str, tensor: Any, kind: Any = None) -> None:
        self.gives(name, tensor.set_dim(self.dim).set_stride(self.stride), kind or self.io)

    def plan(self, device: torch.device) -> Plan:
        """Raises what the package raises (cudnnGraphNotSupportedError) where no engine takes the graph."""
        modes = self.cudnn.heur_mode
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=device)
        return Plan(self.graph, self.named, self.constants, workspace, self.handle)


def forward(case: Case, handle: Any, zeros: Tensor | None = None) -> Draft:
    """x, z, weight, bias, mean, variance (both running) -> y, batch_mean, batch_rstd, new_mean, new_variance,
    mask. zeros: what y is compared with for the mask, of x's shape; without, with one 0 from the host."""
    draft = Draft(case, handle)
    graph, kinds = draft.graph, draft.cudnn.data_type
    y, *statistics = graph.batchnorm(
        name="norm", input=draft.like_x("x"), scale=draft.vector("weight"), bias=draft.vector("bias"),
        in_running_mean=draft.vector("mean"), in_running_var=draft.vector("variance"),
        epsilon=draft.number("eps", EPS), momentum=draft.number("momentum", MOMENTUM),
    )  # fmt: skip
    if case.residual:
        y = graph.add(name="sum", a=y, b=draft.like_x("z"))
    if case.activation:
        y = graph.relu(name="relu", input=y)
        zero = draft.number("zero", 0.0) if zeros is None else draft.like_x("zero")
        draft.constants |= {} if zeros is None else {"zero": zeros}
        mask = graph.cmp_gt(name="sign", input=y, comparison=zero)
        draft.gives_like_x("mask", mask, kinds.BOOLEAN)
    draft.gives_like_x("y", y)
    names = ("batch_mean", "batch_rstd", "new_mean", "new_variance")
    for name, tensor in zip(names, statistics, strict=True):
        draft.gives(name, tensor, draft.wide)
    return draft


def backward(case: Case, handle: Any) -> Draft:
    """dy, x, weight, batch_mean, batch_rstd, mask -> dx, dweight, dbias, and dz where it is not dy."""
    draft = Draft(case, handle)
    graph, gradient = draft.graph, draft.like_x("dy")
    if case.activation:
        mask = draft.like_x("mask", draft.cudnn.data_type.BOOLEAN)
        gradient = graph.scale(name="drelu", input=gradient, scale=mask)
        gradient.set_data_type(draft.io)
        if case.residual:
            draft.gives_like_x("dz", gradient)
    dx, dweight, dbias = graph.batchnorm_backward(
        name="dnorm", grad=gradient, input=draft.like_x("x"), scale=draft.vector("weight"),
        mean=draft.vector("batch_mean"), inv_variance=draft.vector("batch_rstd"),
    )  # fmt: skip
    draft.gives_like_x("dx", dx)
    draft.gives("dweight", dweight, draft.wide)
    draft.gives("dbias", dbias, draft.wide)
    return draft


@functools.cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return import_module(PACKAGE).create_handle()


def plans(case: Case, device: torch.device) -> tuple[Plan, Plan]:
    """Of forward and backward."""
    handle = _handle(device)
    try:
        first = forward(case, handle).plan(device)
    except Exception:  # the package's own class, which a machine without it cannot name
        if not case.activation:
            raise
        # NVIDIA's sample compares with zeros of x's size: only where one 0 will not do
        first = forward(case, handle, torch.zeros_like(case.empty(device))).plan(device)
    return first, backward(case, handle).plan(device)


class _Graphs(torch.autograd.Function):
    """The mask has a byte an element, as in NVIDIA's samples, of which cuDNN writes a bit: its peak memory is
    larger than it need be."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor,
        running: tuple[Tensor, Tensor], both: tuple[Plan, Plan], masked: bool,
    ) -> Tensor:  # fmt: skip
        mean, variance = running
        y, batch_mean, batch_rstd = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        kept: Buffers = {"x": x, "weight": weight, "batch_mean": batch_mean, "batch_rstd": batch_rstd}
        if masked:
            kept["mask"] = torch.empty_like(x, dtype=torch.bool)
        buffers: Buffers = {
            **kept, "y": y, "bias": bias, "mean": mean, "variance": variance,
            "new_mean": mean, "new_variance": variance, **({} if z is None else {"z": z}),
        }  # fmt: skip
        both[0].run(buffers)
        ctx.save_for_backward(*kept.values())
        ctx.names, ctx.plan, ctx.residual = tuple(kept), both[1], z is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weight = kept["weight"]
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        given: Buffers = {"dy": dy, **kept, "dx": torch.empty_like(dy), "dweight": dweight, "dbias": dbias}
        dz = dy if ctx.residual else None
        if ctx.residual and "mask" in kept:
            dz = given["dz"] = torch.empty_like(dy)
        ctx.plan.run(given)
        return given["dx"], dz, dweight, dbias, None, None, None


def _unable(case: Case, device: torch.device) -> str | None:
    if case.norm != "BatchNorm":
        return f"its graphs here are BatchNorm's, not {case.norm}'s"
    if case.activation not in (None, "relu"):
        return f"its graphs here have no {case.activation}"
    if case.dtype not in TYPES:
        return f"it has no {NAMES[case.dtype]}"
    if device.type != "cuda":
        return "needs a GPU with cuDNN"
    return lacks(PACKAGE)


def _build(case: Case, device: torch.device) -> Contender:
    """Raises what the package says where the machine's cuDNN has no engine for the case."""
    g, both = given(case, device), plans(case, device)
    running, masked = (g.running_mean, g.running_var), case.activation is not None

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        y: Tensor = _Graphs.apply(x, z, g.weight, g.bias, running, both, masked)
        return y

    version = import_module(PACKAGE).backend_version()
    zeros = ", reads zeros of x's size" if both[0].reads_zeros else ""
    return Contender(f"cuDNN {version}, a graph each way{zeros}", forward, g.parameters)


FRONTEND = Baseline("cudnn-frontend", "cuDNN's fused graphs, by nvidia-cudnn-frontend", _unable, _build)
