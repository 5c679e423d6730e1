"""Residual and activation in whole graphs, in torch.fx and in export; the bytes that they move; which sizes
have a mask."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor, nn

import bnfast
from bnfast.kernels import plan, views
from bnfast.kernels.batch_plan import Pass, plan_whole
from bnfast.kernels.epilogue import Activation, Epilogue, EpiloguePlan
from bnfast.kernels.records import Problem
from bnfast.ptx import Execution
from tests.support import kernel_calls as kernels
from tests.support.fused_cases import given
from tests.support.layers import assert_same, data, every_path, step
from tests.support.traffic import Moved, moved

X = data(2, 8, 3, 4)


class Block(nn.Module):
    """Every family of layers with an activation, two of them with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.one = bnfast.BatchNorm2d(8, activation="silu")
        self.two = bnfast.GroupNorm(2, 8, activation="relu")
        self.three = bnfast.LayerNorm(4, activation=("leaky_relu", 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x), x), residual=x)


@every_path
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_whole_graph(backend: str, path: str) -> None:
    torch._dynamo.reset()
    block, other = Block(), Block()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    found, expected = (step(module, X, run) for module, run in ((block, compiled), (other, None)))
    assert_same(found, expected, rtol=1e-4, atol=1e-4)


def test_fx_records_the_residual() -> None:
    block = Block()
    graph = torch.fx.symbolic_trace(block)
    called = [len(node.args) + len(node.kwargs) for node in graph.graph.nodes if node.op == "call_module"]
    assert called == [1, 2, 2]
    torch.testing.assert_close(graph(X), Block()(X))


def test_export_is_plain_aten() -> None:
    exported = torch.export.export(Block().eval(), (X,))
    assert not any("bnfast" in str(node.target) for node in exported.graph.nodes)


# Forward and backward on the kernels, and how often each pass of them reads x
NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "batch": (
        lambda x, w, b, e: kernels.batch_norm_train(x, w, b, epilogue=e),
        lambda x, dy, table, w, b, e: kernels.batch_norm_backward(x, dy, table, epilogue=e),
        2.0,
    ),
    "group that is held": (
        lambda x, w, b, e: kernels.group_norm(x, 2, w, b, e),
        lambda x, dy, table, w, b, e: kernels.group_norm_backward(x, dy, table, 2, w, bias=b, epilogue=e),
        1.0,
    ),
}
TRAFFIC = [
    ("batch", *case)
    for case in itertools.product(
        [("relu", False), ("relu", True), ("silu", True)],
        ["contiguous", "channels_last"],
        [(8, 24, 7, 7), (4, 16, 14, 14), (2, 8, 66, 64)],
    )
] + [("group that is held", ("relu", True), "contiguous", shape) for shape in ((4, 16, 8, 8), (4, 16, 7, 7))]


def flows(t: Moved, *tensors: Tensor | None) -> list[tuple[float, float]]:
    """Reads and writes of each tensor, in units of itself."""
    return [(t.of(tensor).reads, t.of(tensor).writes) for tensor in tensors if tensor is not None]


@pytest.mark.compiled
@pytest.mark.usefixtures("several_programs", "two_launches")
@pytest.mark.parametrize(("norm", "after", "layout", "shape"), TRAFFIC, ids=str)
def test_bytes(
    norm: str, after: tuple[str, bool], layout: str, shape: tuple[int, ...], executed: list[Execution]
) -> None:
    """In two launches BatchNorm with relu moves 3T and 5T; with a residual 4T and 6T, and a mask: a bit or a
    byte for each element. silu reads the residual again in place of a mask. A one-pass group is read once."""
    (activation, residual), (forward, backward, passes) = after, NORMS[norm]
    g = given(shape, torch.bfloat16, "train", layout, residual)
    x, dy, z, vectors = g["x"], g["dy"], g.get("z"), (g["weight"], g["bias"])
    keeps = residual and activation == "relu"
    with moved(executed) as t:
        y, table, mask = forward(x, *vectors, Epilogue(Activation(activation), z, keeps))
    assert t.launches == passes
    assert (mask is not None) == keeps
    bits = (shape[1] if layout == "channels_last" else shape[2] * shape[3]) % 8 == 0
    assert mask is None or mask.nbytes * (8 if bits else 1) == x.numel()
    assert flows(t, x, y) == [(passes, 0.0), (0.0, 1.0)]
    assert flows(t, z, mask) == [(1.0, 0.0)] * residual + [(0.0, 1.0)] * keeps
    kept = z if mask is None else mask
    with moved(executed) as t:
        dx, _, _, dz = backward(x, dy, table, *vectors, Epilogue(Activation(activation), kept))
    assert t.launches == 2
    assert flows(t, x, dy, dx) == [(passes, 0.0), (1.0 if residual else passes, 0.0), (0.0, 1.0)]
    assert flows(t, kept, dz) == ([(1.0, 0.0), (passes - 1, 1.0)] if residual else [])


@settings(max_examples=300, deadline=None)
@example(n=2, c=8, s=49, itemsize=8, last=True, aligned=True, sms=2, group=False)  # 4 channels are 32 bytes
@drawn(
    n=st.integers(1, 300), c=st.integers(1, 300), s=st.integers(1, 4000), itemsize=st.sampled_from((2, 4, 8)),
    last=st.booleans(), aligned=st.booleans(), sms=st.sampled_from((2, 132)), group=st.booleans(),
)  # fmt: skip
def test_where_a_mask_has_bits_no_byte_is_two_programs(
    n: int, c: int, s: int, itemsize: int, last: bool, aligned: bool, sms: int, group: bool
) -> None:
    last = last or s == 1
    if not views.packs(c, s, last):
        return
    x = Problem(1 if group else n, c, s, itemsize, last, aligned, sms)
    rest = (n, c) if group else ()
    planned = [plan.plan_elementwise(x, 2, *rest), plan.plan_reduction(x, 2, *rest)]
    if not group:
        after = EpiloguePlan.of("relu", True, c, s, last)
        planned += filter(None, (plan_whole(x, Pass.forward(after)), plan_whole(x, Pass.backward(after))))
    for each in planned:
        view = each.view
        numbers = [view.pitch, view.width, view.lanes] + [view.total] * (view.mode == "nhwc_packed" or group)
        assert not any(number % 8 for number in numbers), each
