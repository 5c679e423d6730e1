"""A stand-in for NVIDIA's `cudnn` package: graphs of the operations that benchmarks/cudnn.py
uses, computed by torch. It is as strict as the real one about what a graph is given and in which layout."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TYPES = {
    "HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32, "BOOLEAN": torch.bool
}  # fmt: skip
Values = dict["Node", Tensor]


class Node:
    """A tensor of a graph: given (source None), or what `source` makes of those given."""

    def __init__(self, source: Callable[[Values], Tensor] | None = None) -> None:
        self.source, self.output = source, False
        self.dim: list[int] | None = None
        self.stride: list[int] | None = None
        self.kind: str | None = None

    def set_output(self, output: bool) -> Node:
        self.output = output
        return self

    def set_data_type(self, kind: str) -> Node:
        self.kind = kind
        return self

    def set_dim(self, dim: list[int]) -> Node:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Node:
        self.stride = stride
        return self

    def of(self, values: Values) -> Tensor:
        return values[self] if self.source is None else self.source(values)

    def check(self, t: Tensor) -> None:
        """As it will be read and written: by its address alone."""
        assert not t.requires_grad
        if self.kind is not None:
            assert t.dtype == TYPES[self.kind]
        if self.dim is not None and self.dim[0] != 1:
            assert (list(t.shape), list(t.stride())) == (self.dim, self.stride)


class Graph:
    """`steps` are those of building it, which `execute` wants in their order."""

    scalars = True  # whether it takes a comparison with one number

    def __init__(
        self, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: object
    ) -> None:
        self.nodes: list[Node] = []
        self.steps: list[str] = []
        self.compares_with_one = False

    def _node(self, source: Callable[[Values], Tensor] | None = None) -> Node:
        self.nodes.append(Node(source))
        return self.nodes[-1]

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> Node:
        return self._node().set_dim(dim).set_stride(stride).set_data_type(data_type)

    def tensor_like(self, t: Tensor) -> Node:
        return self._node().set_data_type(next(name for name, kind in TYPES.items() if kind == t.dtype))

    def batchnorm(
        self, name: str, input: Node, scale: Node, bias: Node, in_running_mean: Node, in_running_var: Node,
        epsilon: Node, momentum: Node,
    ) -> list[Node]:  # fmt: skip
        def all_of_them(values: Values) -> tuple[Tensor, ...]:
            x = input.of(values).float()
            mean, variance = in_running_mean.of(values).clone(), in_running_var.of(values).clone()
            vectors = (scale.of(values), bias.of(values), mean, variance)
            factor, eps = momentum.of(values).item(), epsilon.of(values).item()
            return *torch.native_batch_norm(x, *vectors, True, factor, eps), mean, variance

        return [self._node(lambda values, i=i: all_of_them(values)[i]) for i in range(5)]

    def batchnorm_backward(
        self, name: str, grad: Node, input: Node, scale: Node, mean: Node, inv_variance: Node
    ) -> list[Node]:
        def all_of_them(values: Values) -> tuple[Tensor, ...]:
            dy, x = grad.of(values).float(), input.of(values).float()
            saved = (mean.of(values), inv_variance.of(values))
            weight = scale.of(values)
            return torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, None, None, *saved, True, 0.0, [True] * 3
            )

        return [self._node(lambda values, i=i: all_of_them(values)[i]) for i in range(3)]

    def add(self, name: str, a: Node, b: Node) -> Node:
        return self._node(lambda values: a.of(values) + b.of(values))

    def scale(self, name: str, input: Node, scale: Node) -> Node:
        return self._node(lambda values: input.of(values) * scale.of(values))

    def relu(self, name: str, input: Node) -> Node:
        return self._node(lambda values: input.of(values).relu())

    def cmp_gt(self, name: str, input: Node, comparison: Node) -> Node:
        self.compares_with_one = comparison.dim is None
        return self._node(lambda values: input.of(values) > comparison.of(values))

    def validate(self) -> None:
        self.steps.append("validate")

    def build_operation_graph(self) -> None:
        self.steps.append("build_operation_graph")

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        self.steps.append("create_execution_plans")

    def check_support(self) -> None:
        if self.compares_with_one and not self.scalars:
            raise RuntimeError("No valid engine configs for Norm_Fwd_\n{and much more}")
        self.steps.append("check_support")

    def build_plans(self) -> None:
        self.steps.append("build_plans")

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: Values, workspace: Tensor, handle: object) -> None:
        steps = [
            "validate",
            "build_operation_graph",
            "create_execution_plans",
            "check_support",
            "build_plans",
        ]
        assert self.steps == steps
        needed = {node for node in self.nodes if node.source is None or node.output}
        assert pack.keys() == needed
        for node, t in pack.items():
            node.check(t)
        outputs = [(pack[node], node.of(pack)) for node in pack if node.output]
        for place, value in outputs:
            place.copy_(value)


def module() -> Any:
    """To stand in sys.modules["cudnn"]."""
    graph = type("pygraph", (Graph,), {})
    names = SimpleNamespace(**{name: name for name in TYPES})
    modes = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    return SimpleNamespace(
        pygraph=graph, data_type=names, heur_mode=modes, create_handle=object,
        set_stream=lambda handle, stream: None, backend_version=lambda: 92000,
    )  # fmt: skip
