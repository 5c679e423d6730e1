"""cuDNN's graphs as they are written, with a stand-in for NVIDIA's package: which tensors they are given, in
which layouts, and that what they say is a BatchNorm with what surrounds it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, cudnn, fairness, measure
from benchmarks.cudnn import FRONTEND, TYPES
from benchmarks.records import CANNOT
from codegen.cases import Case

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = Case("BatchNorm", (4, 16, 6, 6), 0, torch.float32, False, "relu", True)


def forward(input: Tensor, epsilon: Tensor, momentum: Tensor, **vectors: Tensor) -> tuple[Tensor, ...]:
    weight, bias, mean, variance = (v.flatten().clone() for v in vectors.values())
    state = (weight, bias, mean, variance, True, momentum.item(), epsilon.item())
    return *torch.native_batch_norm(input.float(), *state), mean, variance


def backward(grad: Tensor, input: Tensor, **vectors: Tensor) -> tuple[Tensor, ...]:
    weight, *saved = (v.flatten() for v in vectors.values())
    rest = (weight, None, None, *saved, True, 0.0, [True] * 3)
    return torch.ops.aten.native_batch_norm_backward(grad.float(), input.float(), *rest)


# what a graph can do, as the package names its arguments, and how many results that has
OPERATIONS = {
    "batchnorm": (forward, 5), "batchnorm_backward": (backward, 3), "add": (lambda a, b: [a + b], 1),
    "scale": (lambda input, scale: [input * scale], 1), "relu": (lambda input: [input.relu()], 1),
    "cmp_gt": (lambda input, comparison: [input > comparison], 1),
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class Node:
    like: Tensor
    kind: str = ""
    output: bool = False

    def set_output(self, output: bool) -> Node:
        self.output = output
        return self

    def set_data_type(self, kind: str) -> Node:
        self.kind = kind
        return self


class Graph:
    """As strict as the real one about what it is given, and in which layout."""

    one_zero = True  # whether it takes a comparison with one number

    def __init__(self, **types: object) -> None:
        assert types.keys() == {"io_data_type", "intermediate_data_type", "compute_data_type", "handle"}
        self.given: list[Node] = []
        self.program: list[tuple[str, dict[str, Node], list[Node]]] = []
        self.built = False

    def tensor_like(self, t: Tensor) -> Node:
        self.given.append(Node(t, TYPES[t.dtype]))
        return self.given[-1]

    def __getattr__(self, operation: str) -> Any:
        def written(name: str, **given: Node) -> Any:
            x, _, *more = next(iter(given.values())), *range(OPERATIONS[operation][1])
            made = [Node(x.like), *(Node(given["scale"].like) for _ in more)]
            self.program.append((operation, given, made))
            return made if more else made[0]

        return written

    def build(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        zeros = [given["comparison"] for operation, given, _ in self.program if operation == "cmp_gt"]
        if not self.one_zero and any(zero.like.numel() == 1 for zero in zeros):
            raise RuntimeError("No valid engine configs for Norm_Fwd_\n{and much more}")
        self.built = True

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[Node, Tensor], workspace: Tensor, handle: object) -> None:
        assert self.built
        outputs = [node for _, _, made in self.program for node in made if node.output]
        assert pack.keys() == {*self.given, *outputs}
        for node, t in pack.items():
            assert not t.requires_grad
            assert (TYPES[t.dtype], t.numel()) == (node.kind, node.like.numel())
            assert t.dim() == 1 or t.stride() == node.like.stride()
        values = dict(pack)
        for operation, given, made in self.program:
            results = OPERATIONS[operation][0](**{name: values[node] for name, node in given.items()})
            values |= dict(zip(made, results, strict=True))
        for node in outputs:
            pack[node].copy_(values[node].view_as(pack[node]))


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = SimpleNamespace(
        pygraph=type("pygraph", (Graph,), {}), data_type=SimpleNamespace(**{k: k for k in TYPES.values()}),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"), create_handle=object,
        set_stream=Mock(), backend_version=lambda: 92000,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    cudnn._handle.cache_clear()
    yield module
    cudnn._handle.cache_clear()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("one_zero", [True, False], ids=["one-zero", "zeros"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_step_is_right(
    dtype: torch.dtype, activation: str | None, residual: bool, one_zero: bool, last: bool, fake: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its results, and its running statistics, also of five dimensions."""
    fake.pygraph.one_zero = one_zero
    for shape in ((4, 16, 6, 6), (2, 16, 3, 4, 5)):
        case = Case("BatchNorm", shape, 0, dtype, last, activation, residual)
        used = baselines.given(case, CPU)
        monkeypatch.setattr(cudnn, "given", lambda case, device, used=used: used)
        running_mean, _ = used[1]
        provider, before = FRONTEND.build(case, CPU), running_mean.clone()
        zeros = ", reads zeros of x's size" if activation and not one_zero else ""
        assert provider.ran == f"cuDNN 92000, a graph each way{zeros}"
        found = fairness.step(provider, case, CPU)
        assert fairness.checked(found, case, CPU) is None
        assert fairness.strayed(found, case) == ""
        mean = case.tensor(CPU, 0).float().transpose(0, 1).flatten(1).mean(1)
        torch.testing.assert_close(running_mean, 0.9 * before + 0.1 * mean)
    assert fake.set_stream.call_args.kwargs["stream"] == 7


def test_a_machine_without_an_engine_is_told_in_the_table(fake: Any) -> None:
    fake.pygraph.build = Mock(side_effect=RuntimeError("No valid engine configs for Norm_Fwd_\n{...}"))
    anywhere = dataclasses.replace(FRONTEND, unable=lambda case, device: None)
    (record,) = measure.of_case(CASE, [anywhere], CPU, measure.Method(rounds=5))
    assert record.status == CANNOT
    assert record.note == "RuntimeError: No valid engine configs for Norm_Fwd_ {...}"


@pytest.mark.parametrize(("change", "why"), [
    ({"norm": "GroupNorm", "groups": 4}, "cuDNN is asked for BatchNorm, not for GroupNorm"),
    ({"activation": "silu"}, "its graphs here have no silu"),
    ({"dtype": torch.float64}, "it has no fp64"),
    ({}, None),
])  # fmt: skip
def test_what_it_takes(change: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    case = dataclasses.replace(CASE, **change)
    assert FRONTEND.unable(case, CUDA) == why
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert FRONTEND.unable(case, CUDA) == (why or "cudnn cannot be imported here: ModuleNotFoundError")
    (operator,) = measure.get(["cudnn-op"])
    assert operator.unable(case, CUDA) == (why if "norm" in change else None)
    for each in (FRONTEND, operator):
        assert each.unable(CASE, CPU) == "needs a GPU with cuDNN"
