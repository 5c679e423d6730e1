"""What the kernels do to memory, counted in the interpreter: bytes, sectors, launches, races, stray
accesses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnfast.kernels import plan
from bnfast.kernels.layouts import is_channels_last
from bnfast.kernels.records import Problem
from tests.support import kernel_calls as kernels
from tests.support.trace import clean, trace

SHAPES = [(8, c, size, size) for c in (24, 64, 96) for size in (7, 14, 28)] + [
    (5, 13, 3, 4),
    (4, 3, 15, 15),
    (2, 3, 70, 66),
    (1, 1, 66, 80),
    (33, 65, 1, 1),
    (2, 2, 3, 5, 7),
]
pytestmark = pytest.mark.usefixtures("several_programs")
SMS = 3  # the fixture's
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensors(shape: tuple[int, ...], layout: str, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    memory_format = FORMATS[len(shape)] if layout == "channels_last" else torch.contiguous_format
    return [torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(count)]


BOTH = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
EVERY = pytest.mark.parametrize("shape", SHAPES, ids=str)


@BOTH
@EVERY
def test_training_step(shape: tuple[int, ...], layout: str) -> None:
    training_step(shape, layout, None)


@BOTH
def test_batch_renorm_is_no_dearer(layout: str) -> None:
    training_step((4, 24, 7, 7), layout, kernels.RENORM)


def training_step(shape: tuple[int, ...], layout: str, renorm: Any) -> None:
    """Forward: x twice, y once, two launches. Backward: dy and x twice, dx once, two launches. Whole
    sectors throughout. The plan counts the same, and what programs hand over.
    """
    x, dy = tensors(shape, layout, torch.float16, 2)
    channels = shape[1]
    weight, bias, mean, variance = (torch.rand(channels) for _ in range(4))
    batches = torch.tensor(0)
    with trace(x=x, batches=batches) as t:
        y, table, _ = kernels.batch_norm_train(x, weight, bias, mean, variance, batches, renorm=renorm)
    sizes = (shape[0], channels, torch.Size(shape[2:]).numel(), x.element_size(), is_channels_last(x))
    planned = plan.batch_norm(*sizes, sms=SMS)
    clean(t, planned.forward_launches)
    assert t.moved("x", "y", "partials") == planned.forward_bytes
    assert (t["x"].reads, t["x"].writes, t.of(y).writes, t.of(y).reads) == (2.0, 0.0, 1.0, 0.0)
    assert t.of(y).unique_written == t.of(y).size
    assert batches.item() == 1
    with trace(x=x, dy=dy) as b:
        dx, dweight, dbias, _ = kernels.batch_norm_backward(x, dy, table)
    clean(b, planned.backward_launches)
    assert b.moved("x", "dy", "dx", "partials") == planned.backward_bytes
    assert dx is not None
    assert (b["x"].reads, b["dy"].reads, b.of(dx).writes) == (2.0, 2.0, 1.0)
    assert b.of(dx).unique_written == b.of(dx).size
    if shape[1] in (24, 64, 96):
        flows = [
            t["x"].read_efficiency,
            t.of(y).write_efficiency,
            b["x"].read_efficiency,
            b["dy"].read_efficiency,
        ]
        assert min(flows) >= 0.97


@BOTH
@EVERY
def test_eval(shape: tuple[int, ...], layout: str) -> None:
    """Forward: one launch, x once. Backward: one sweep; without parameter gradients dy once and dx once, x
    not at all.
    """
    x, dy = tensors(shape, layout, torch.float16, 2)
    mean, variance = torch.rand(shape[1]), torch.rand(shape[1])
    with trace(x=x) as t:
        y, table, _ = kernels.batch_norm_eval(x, mean, variance)
    clean(t, 1)
    assert (t["x"].reads, t.of(y).writes) == (1.0, 1.0)
    assert t.of(table).unique_written == t.of(table).size
    with trace(x=x, dy=dy) as b:
        dx, *_ = kernels.batch_norm_backward(x, dy, table, training=False)
    clean(b, 1)
    assert dx is not None
    assert (b["x"].reads, b["dy"].reads, b.of(dx).writes) == (1.0, 1.0, 1.0)
    with trace(x=x, dy=dy) as s:
        dx, *_ = kernels.batch_norm_backward(x, dy, table, (True, None, None), training=False)
    clean(s, 1)
    assert dx is not None
    assert (s["x"].reads, s["dy"].reads, s.of(dx).writes) == (0.0, 1.0, 1.0)


@BOTH
def test_only_what_is_wanted(layout: str) -> None:
    """Parameter gradients alone: one launch, dy and x once."""
    x, dy = tensors((8, 24, 7, 7), layout, torch.float16, 2)
    _, table, _ = kernels.batch_norm_train(x)
    with trace(x=x, dy=dy) as t:
        dx, dweight, dbias, _ = kernels.batch_norm_backward(x, dy, table, (False, torch.float32, None))
    clean(t, 1)
    assert dx is None
    assert dbias is None
    assert (t["x"].reads, t["dy"].reads) == (1.0, 1.0)
    with trace(x=x, dy=dy) as t:
        _, dweight, dbias, _ = kernels.batch_norm_backward(x, dy, table, (True, None, None))
    clean(t, 2)
    assert dweight is None
    assert dbias is None


@BOTH
@pytest.mark.parametrize("cut", [1, 3, 8], ids="cut {}".format)
def test_unaligned_storage(cut: int, layout: str) -> None:
    """A tensor that starts anywhere in its storage: the same traffic, no vector reaching outside it."""
    shape = (4, 16, 5, 5)
    (whole,) = tensors(shape, layout, torch.float16, 1)
    storage = torch.zeros(whole.numel() + cut, dtype=torch.float16)
    x = torch.as_strided(storage, shape, whole.stride(), cut).copy_(whole)
    with trace(x=x) as t:
        y, *_ = kernels.batch_norm_train(x)
    clean(t, 2)
    assert (t["x"].reads, t.of(y).writes) == (2.0, 1.0)
    expected, *_ = kernels.batch_norm_train(whole)
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(64, 1, 1, 1), (1, 1, 64, 64), (1, 8, 40, 40)], ids=str)
def test_a_channel_is_split_over_programs(shape: tuple[int, ...]) -> None:
    """Also where there is one channel or one sample: C programs would idle the GPU."""
    n, c, s = shape[0], shape[1], shape[2] * shape[3]
    large = 64 if s > 1 else 2048
    for last in (True, False):
        sweep = plan.plan_reduction(Problem(n * large, c, s * 64, 2, last), 1)
        assert sweep.programs >= 0.75 * 132
