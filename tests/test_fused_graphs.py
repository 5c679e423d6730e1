"""Residual and activation in graphs: operators, whole graphs, fx; their traffic; which sizes have signs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnfast
from bnfast.kernels import plan, views
from bnfast.kernels.epilogue import Activation, Epilogue
from bnfast.kernels.records import Problem
from tests.support import kernel_calls as kernels
from tests.support.fused_cases import given
from tests.support.layers import every_path
from tests.support.trace import clean, trace

OPERATORS = torch.ops.bnfast


class Block(nn.Module):
    """A residual block's two ends."""

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
    x = torch.randn(2, 8, 3, 4)
    results = []
    for module in (compiled, other):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


def test_fx_records_the_residual() -> None:
    block = Block()
    graph = torch.fx.symbolic_trace(block)
    called = [len(node.args) + len(node.kwargs) for node in graph.graph.nodes if node.op == "call_module"]
    assert called == [1, 2, 2]
    x = torch.randn(2, 8, 3, 4)
    torch.testing.assert_close(graph(x), Block()(x))


def test_export_is_plain_aten() -> None:
    exported = torch.export.export(Block().eval(), (torch.randn(2, 8, 3, 4),))
    assert not any("bnfast" in str(node.target) for node in exported.graph.nodes)


def traffic(t: Any, launches: int, **expected: tuple[float, float]) -> None:
    """Reads and writes of each tensor by name, in units of itself."""
    clean(t, launches)
    assert {name: (t[name].reads, t[name].writes) for name in expected} == expected


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 24, 7, 7), (4, 16, 14, 14), (2, 8, 66, 64)], ids=str)
def test_bytes_of_batch_norm(shape: tuple[int, ...], layout: str) -> None:
    """With relu 3T and 5T; with a residual besides 4T + T/16 and 6T + T/16, of signs; of silu z again."""
    g = given(shape, torch.bfloat16, "train", layout)
    x, dy, z = g["x"], g["dy"], g["z"]
    with trace(x=x) as t:
        y, table, none = kernels.batch_norm_train(
            x, g["weight"], g["bias"], epilogue=Epilogue(Activation("relu"))
        )
    assert none is None
    traffic(t, 2, x=(2.0, 0.0))
    assert t.of(y).writes == 1.0
    with trace(x=x, dy=dy) as t:
        dx, *_, none = kernels.batch_norm_backward(x, dy, table, epilogue=Epilogue(Activation("relu")))
    assert none is None
    traffic(t, 2, x=(2.0, 0.0), dy=(2.0, 0.0))
    assert t.of(dx).writes == 1.0
    for epilogue, again in (
        (Epilogue(Activation("relu"), z, True), 0.0),
        (Epilogue(Activation("silu"), z), 1.0),
    ):
        with trace(x=x, z=z) as t:
            y, table, signs = kernels.batch_norm_train(x, g["weight"], g["bias"], epilogue=epilogue)
        traffic(t, 2, x=(2.0, 0.0), z=(1.0, 0.0))
        assert (signs is None) == bool(again)
        if signs is not None:
            assert signs.nbytes * 16 == x.nbytes
            assert t.of(signs).writes == 1.0
        kept = z if signs is None else signs
        with trace(x=x, dy=dy, kept=kept) as t:
            dx, _, _, dz = kernels.batch_norm_backward(
                x, dy, table, epilogue=Epilogue(epilogue.activation, kept)
            )
        traffic(t, 2, x=(2.0, 0.0), dy=(1.0, 0.0), kept=(1.0, 0.0))
        assert (t.of(dz).reads, t.of(dz).writes, t.of(dx).writes) == (1.0, 1.0, 1.0)


@pytest.mark.usefixtures("several_programs")
def test_bytes_of_group_norm_that_holds_its_groups() -> None:
    """x once; signs are read once, for relu leaves nothing to find anew."""
    g = given((4, 16, 8, 8), torch.bfloat16, "group")
    x, dy, z = g["x"], g["dy"], g["z"]
    with trace(x=x, z=z) as t:
        y, table, signs = kernels.group_norm(
            x, 2, g["weight"], g["bias"], Epilogue(Activation("relu"), z, True)
        )
    traffic(t, 1, x=(1.0, 0.0), z=(1.0, 0.0))
    assert signs is not None
    assert (t.of(y).writes, t.of(signs).writes) == (1.0, 1.0)
    epilogue = Epilogue(Activation("relu"), signs)
    with trace(x=x, dy=dy, signs=signs) as t:
        dx, _, _, dz = kernels.group_norm_backward(
            x, dy, table, 2, g["weight"], bias=g["bias"], epilogue=epilogue
        )
    traffic(t, 2, x=(1.0, 0.0), dy=(1.0, 0.0), signs=(1.0, 0.0))
    assert (t.of(dx).writes, t.of(dz).writes) == (1.0, 1.0)


@settings(max_examples=300, deadline=None)
@drawn(
    n=st.integers(1, 300), c=st.integers(1, 300), s=st.integers(1, 4000), itemsize=st.sampled_from((2, 4, 8)),
    last=st.booleans(), aligned=st.booleans(), sms=st.sampled_from((2, 132)), group=st.booleans(),
)  # fmt: skip
def test_where_there_are_signs_no_byte_is_two_programs(
    n: int, c: int, s: int, itemsize: int, last: bool, aligned: bool, sms: int, group: bool
) -> None:
    last = last or s == 1
    if not views.packs(c, s, itemsize, last):
        return
    x = Problem(1 if group else n, c, s, itemsize, last, aligned, sms)
    rest = (n, c) if group else ()
    for sweep in (plan.plan_elementwise(x, 2, *rest), plan.plan_reduction(x, 2, *rest)):
        view = sweep.view
        numbers = [view.pitch, view.width, view.lanes] + [view.total] * (view.mode == "nhwc_packed" or group)
        assert not any(number % 8 for number in numbers), sweep
