"""BatchNorm with what surrounds it as one cuDNN graph a direction, through NVIDIA's nvidia-cudnn-frontend:

forward   x -> batchnorm -> (+ z) -> (relu -> y > 0, a mask)
backward  dy -> (* mask, which is dz) -> batchnorm_backward

torch itself never calls these: its layer runs cuDNN's BatchNorm alone. Written from NVIDIA's documentation
and samples (samples/cpp/norm/batchnorm.cpp, test/python/test_batchnorm.py of its cudnn-frontend), and tested
with a stand-in for the package: not run on a GPU yet. For which of these graphs a machine's cuDNN has engines
shows when they are built."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import EPS, MOMENTUM, Baseline, Provider, given, lacks
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
        examples = {**dict.fromkeys(LIKE_X, x), "mask": torch.empty_like(x, dtype=torch.bool), **constants}
        self.constants, self.example = constants, lambda name: examples.get(name, vector)
        self.nodes: dict[str, Any] = {}
        self.made: dict[str, Tensor] = {}

    def reads(self, names: str) -> list[Any]:
        own = {name: self.graph.tensor_like(self.example(name)) for name in names.split()}
        self.nodes |= own
        return list(own.values())

    def makes(self, **nodes: Any) -> Graph:
        """Raises what the package raises where no engine takes the graph."""
        for name, node in nodes.items():
            like = self.made[name] = self.example(name).to("meta")
            kind = getattr(self.cudnn.data_type, TYPES[like.dtype])
            self.nodes[name] = node.set_output(True).set_data_type(kind)
        self.graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        size = max(1, self.graph.get_workspace_size())
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        del self.example  # and its memory
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
    vectors = ("input", "scale", "bias", "in_running_mean", "in_running_var", "epsilon", "momentum")
    given = first.reads("x weight bias mean variance eps momentum")
    y, *statistics = first.graph.batchnorm(name="norm", **dict(zip(vectors, given, strict=True)))
    made = dict(zip(("batch_mean", "batch_rstd", "new_mean", "new_variance"), statistics, strict=True))
    if case.residual:
        y = first.graph.add(name="sum", a=y, b=first.reads("z")[0])
    if zero is not None:
        y = first.graph.relu(name="relu", input=y)
        made["mask"] = first.graph.cmp_gt(name="sign", input=y, comparison=first.reads("zero")[0])
    second, dz = Graph(case, device), {}
    dy, x, weight, mean, rstd = second.reads("dy x weight batch_mean batch_rstd")
    if zero is not None:
        dy = second.graph.scale(name="drelu", input=dy, scale=second.reads("mask")[0]).set_data_type(
            second.io
        )
        dz = {"dz": dy} if case.residual else {}
    dx, dweight, dbias = second.graph.batchnorm_backward(
        name="dnorm", grad=dy, input=x, scale=weight, mean=mean, inv_variance=rstd
    )
    return first.makes(y=y, **made), second.makes(dx=dx, dweight=dweight, dbias=dbias, **dz)


class _Step(torch.autograd.Function):
    """The mask has a byte an element, as in NVIDIA's samples, of which cuDNN writes a bit: its peak memory is
    larger than it need be."""

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
    if case.norm != "BatchNorm":
        return f"its graphs here are BatchNorm's, not {case.norm}'s"
    if case.activation not in (None, "relu"):
        return f"its graphs here have no {case.activation}"
    if case.dtype not in TYPES:
        return f"it has no {NAMES[case.dtype]}"
    return lacks(PACKAGE) if device.type == "cuda" else "needs a GPU with cuDNN"


def _build(case: Case, device: torch.device) -> Provider:
    """Raises what the package says where the machine's cuDNN has no engine for the case."""
    g, ran = given(case, device), f"cuDNN {import_module(PACKAGE).backend_version()}, a graph each way"
    zero = torch.zeros([1] * len(case.shape)) if case.activation else None
    try:
        both = graphs(case, device, zero)
    except Exception:  # the package's own class, which a machine without it cannot name
        if zero is None:
            raise
        # NVIDIA's sample compares with zeros of x's size, T bytes more: only where one 0 will not do
        both = graphs(case, device, torch.zeros_like(case.empty(device)))
        ran += ", reads zeros of x's size"
    vectors = (g.weight, g.bias, g.running_mean, g.running_var)
    return Provider(ran, lambda x, z: _Step.apply(both, x, z, *vectors), g.parameters)


FRONTEND = Baseline("cudnn-frontend", "cuDNN's fused graphs, by nvidia-cudnn-frontend", _unable, _build)
