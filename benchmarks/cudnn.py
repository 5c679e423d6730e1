"""BatchNorm with what surrounds it as one cuDNN graph a direction, through NVIDIA's nvidia-cudnn-frontend:

forward   x -> batchnorm -> (+ z) -> (relu -> y > 0, a mask)
backward  dy -> (* mask, which is dz) -> batchnorm_backward

torch itself never calls these: its layer runs cuDNN's BatchNorm alone. Written from NVIDIA's documentation
and samples (samples/cpp/norm/batchnorm.cpp, test/python/test_batchnorm.py of its cudnn-frontend), and tested
with a stand-in for the package: not run on a GPU yet. For which of these graphs a machine's cuDNN has engines
shows when they are built."""

from __future__ import annotations

import functools
from collections import defaultdict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import EPS, MOMENTUM, Baseline, Provider, given, lacks, no_cudnn
from codegen.cases import NAMES, Case

PACKAGE = "cudnn"
TYPES = {
    torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT", torch.bool: "BOOLEAN",
}  # fmt: skip
LIKE_X = ("x", "z", "dy", "y", "dx", "dz")


@functools.cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return import_module(PACKAGE).create_handle()


class Graph:
    """Sums and statistics are fp32 whatever x is. constants: tensors that it reads at each run; those on the
    host are numbers to it."""

    def __init__(self, case: Case, device: torch.device, **constants: Tensor) -> None:
        self.cudnn, self.handle, self.device = import_module(PACKAGE), _handle(device), device
        kinds, x = self.cudnn.data_type, case.empty(device)
        self.io = getattr(kinds, TYPES[case.dtype])
        types = {"intermediate_data_type": kinds.FLOAT, "compute_data_type": kinds.FLOAT}
        self.graph = self.cudnn.pygraph(io_data_type=self.io, **types, handle=self.handle)
        vector = torch.empty(1, x.shape[1], *[1] * (x.dim() - 2), device=device)
        own = {**dict.fromkeys(LIKE_X, x), "mask": torch.empty_like(x, dtype=torch.bool), **constants}
        self.constants, self.examples = constants, defaultdict(lambda: vector, own)
        self.nodes: dict[str, Any] = {}
        self.made: dict[str, Tensor] = {}

    def read(self, name: str) -> Any:
        node = self.nodes[name] = self.graph.tensor_like(self.examples[name])
        return node

    def writes(self, **nodes: Any) -> Graph:
        """Raises what the package raises where no engine takes the graph."""
        for name, node in nodes.items():
            like = self.made[name] = self.examples[name].to("meta")
            kind = getattr(self.cudnn.data_type, TYPES[like.dtype])
            self.nodes[name] = node.set_output(True).set_data_type(kind)
        self.graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        size = max(1, self.graph.get_workspace_size())
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        del self.examples  # and their memory
        return self

    def __call__(self, **given: Tensor | None) -> dict[str, Tensor]:
        """Runs on torch's stream. Returns all tensors by name; those to write that are not given are new."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        tensors = {name: torch.empty_like(t, device=self.device) for name, t in self.made.items()}
        tensors |= self.constants | {name: t.detach() for name, t in given.items() if t is not None}
        pack = {node: tensors[name] for name, node in self.nodes.items()}
        self.graph.execute(pack, self.workspace, handle=self.handle)
        return tensors


def graphs(case: Case, device: torch.device, zero: Tensor | None) -> tuple[Graph, Graph]:
    """Of forward and backward. zero: what y is compared with for the mask of relu, if that follows."""
    eps, momentum = (torch.full([1] * len(case.shape), value) for value in (EPS, MOMENTUM))
    first = Graph(case, device, eps=eps, momentum=momentum, **({} if zero is None else {"zero": zero}))
    second, mask, dz = Graph(case, device), {}, {}
    y, mean, rstd, new_mean, new_variance = first.graph.batchnorm(
        name="norm", input=first.read("x"), scale=first.read("weight"), bias=first.read("bias"),
        in_running_mean=first.read("mean"), in_running_var=first.read("variance"),
        epsilon=first.read("eps"), momentum=first.read("momentum"),
    )  # fmt: skip
    dy = second.read("dy")
    if case.residual:
        y = first.graph.add(name="sum", a=y, b=first.read("z"))
    if zero is not None:
        y = first.graph.relu(name="relu", input=y)
        mask = {"mask": first.graph.cmp_gt(name="sign", input=y, comparison=first.read("zero"))}
        dy = second.graph.scale(name="drelu", input=dy, scale=second.read("mask")).set_data_type(second.io)
        dz = {"dz": dy} if case.residual else {}
    dx, dweight, dbias = second.graph.batchnorm_backward(
        name="dnorm", grad=dy, input=second.read("x"), scale=second.read("weight"),
        mean=second.read("batch_mean"), inv_variance=second.read("batch_rstd"),
    )  # fmt: skip
    statistics = {"batch_mean": mean, "batch_rstd": rstd, "new_mean": new_mean, "new_variance": new_variance}
    return first.writes(y=y, **statistics, **mask), second.writes(dx=dx, dweight=dweight, dbias=dbias, **dz)


class _Step(torch.autograd.Function):
    """The mask has a byte an element, as in NVIDIA's samples, of which cuDNN writes a bit."""

    @staticmethod
    def forward(
        ctx: Any, graphs: tuple[Graph, Graph], x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor,
        mean: Tensor, variance: Tensor,
    ) -> Tensor:  # fmt: skip
        running = {"mean": mean, "variance": variance, "new_mean": mean, "new_variance": variance}
        made = graphs[0](x=x, z=z, weight=weight, bias=bias, **running)
        ctx.names = [name for name in ("x", "weight", "batch_mean", "batch_rstd", "mask") if name in made]
        ctx.save_for_backward(*(made[name] for name in ctx.names))
        ctx.graph, ctx.residual = graphs[1], z is not None
        return made["y"]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.graph(dy=dy, **dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        dz = made.get("dz", dy) if ctx.residual else None
        return None, made["dx"], dz, made["dweight"].flatten(), made["dbias"].flatten(), None, None


def _unable(case: Case, device: torch.device) -> str | None:
    if case.activation not in (None, "relu"):
        return f"its graphs here have no {case.activation}"
    if case.dtype not in TYPES:
        return f"it has no {NAMES[case.dtype]}"
    return no_cudnn(case, device) or lacks(PACKAGE)


def _build(case: Case, device: torch.device) -> Provider:
    """Raises what the package says where the machine's cuDNN has no engine for the case."""
    parameters, running = given(case, device)
    ran = f"cuDNN {import_module(PACKAGE).backend_version()}, a graph each way"
    zero = torch.zeros([1] * len(case.shape)) if case.activation else None
    try:
        both = graphs(case, device, zero)
    except Exception:  # the package's own class, which a machine without it cannot name
        if zero is None:
            raise
        # NVIDIA's sample compares with zeros of x's size, T bytes more: only where one 0 will not do
        both = graphs(case, device, torch.zeros_like(case.empty(device)))
        ran += ", reads zeros of x's size"
    return Provider(ran, lambda x, z: _Step.apply(both, x, z, *parameters, *running), parameters)


FRONTEND = Baseline("cudnn-frontend", "cuDNN's fused graphs, by nvidia-cudnn-frontend", _build, _unable)
