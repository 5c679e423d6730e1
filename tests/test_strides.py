"""Results lie in memory as torch's do: what draws random numbers by them, or goes on in their format, must
not notice whose they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from bnfast import functional
from bnfast.checks.cases import FORMATS
from tests.support.layers import NORMS, assert_same, data, derivatives, every_path, norms, parameters


def of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).as_strided(shape, strides)


# shape, strides: what reshapes, slices and unsqueezes leave
GIVEN = [
    ((1, 4, 3, 2), (4, 1, 8, 4)),  # after attention: channels_last but for the sample's stride
    ((1, 4, 3, 2), (24, 1, 8, 4)),  # channels_last
    ((1, 4, 3, 2), (7, 6, 2, 1)),
    ((2, 4, 3, 2), (24, 1, 8, 4)),
    ((2, 4, 3, 2), (48, 1, 16, 8)),  # channels of channels_last sliced
    ((2, 4, 3, 2), (48, 12, 4, 2)),
    ((3, 2, 1, 2), (4, 1, 2, 2)),  # channels_last but for the height's stride
    ((3, 2, 1, 2), (4, 1, 4, 2)),
    ((2, 4, 1, 1), (4, 1, 4, 4)),  # both
    ((2, 4, 1, 1), (4, 1, 1, 1)),
    ((2, 1, 3, 2), (6, 1, 2, 1)),
    ((2, 1, 3, 2), (6, 6, 2, 1)),
    ((2, 3, 4, 2), (24, 8, 1, 4)),  # neither
    ((2, 3, 4, 2), (8, 0, 2, 1)),
    ((1, 3, 2, 2, 2), (3, 1, 12, 6, 3)),
    ((1, 3, 2, 2, 2), (24, 1, 12, 6, 3)),
    ((2, 3, 1, 2, 2), (12, 1, 3, 6, 3)),
    ((2, 3, 4), (24, 8, 2)),
    ((1, 3, 4), (5, 4, 1)),
    ((1, 3, 4), (3, 1, 3)),
    ((3, 1), (1, 9)),
    ((1, 1, 1), (8, 4, 2)),  # one value
    ((1, 1, 1, 1), (8, 2, 4, 2)),
    ((1, 1, 1, 1), (8, 4, 2, 2)),
]  # fmt: skip


def more(count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """At random, with many sizes of 1."""
    pick, found = random.Random(0), []
    for _ in range(count):
        dims = pick.choice([4, 4, 5])
        shape, strides, step = [pick.choice([1, 1, 2, 3]) for _ in range(dims)], [0] * dims, 1
        order = pick.choice([list(range(dims)), [0, *range(2, dims), 1], pick.sample(range(dims), dims)])
        for d in reversed(order):
            strides[d], step = step, step * shape[d]
        strides = [pick.choice([1, 2, 6, s]) if n == 1 else s for n, s in zip(shape, strides, strict=True)]
        if max(shape) > 1:
            found.append((tuple(shape), tuple(strides)))
    return found


def expected(name: str, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """torch's strides; channels_last from InstanceNorm too, for what is that and nothing else."""
    memory_format = FORMATS.get(x.dim())
    if not name.startswith("instance") or memory_format is None or x.is_contiguous():
        return y.stride()
    last = F.group_norm(x, 1).stride() == torch.empty(x.shape, memory_format=memory_format).stride()
    if not (last and x.is_contiguous(memory_format=memory_format)):
        return y.stride()
    return torch.empty(x.shape, memory_format=memory_format).stride()


def order(t: Tensor) -> list[int]:
    return [stride for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1]


@every_path
@pytest.mark.parametrize("name", [name for name in NORMS if name != "batch, tracking"])
def test_strides_are_torchs(name: str, path: str, launches: list[Any]) -> None:
    wrong = []
    for shape, strides in GIVEN + more(80) if path == "torch" else GIVEN:
        x = of(shape, strides).requires_grad_()
        try:
            y = NORMS[name](F, x)
        except ValueError:  # one value a cell
            continue
        found = NORMS[name](functional, x)
        assert_close(found, y, rtol=1e-4, atol=1e-4, check_stride=False)
        if found.stride() != expected(name, x, y):
            wrong.append(f"{shape} {strides}: {found.stride()}, not {expected(name, x, y)}")
        (dx,) = torch.autograd.grad(found.square().sum(), x)
        if path == "kernels" and order(dx) != order(found):
            wrong.append(f"gradient of {shape} {strides}: {dx.stride()}, not {found.stride()}")
    assert bool(launches) == (path == "kernels")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NORMS)
def test_strides_of_what_never_ran(name: str) -> None:
    for shape, strides in GIVEN:
        x = of(shape, strides)
        try:
            y = NORMS[name](functional, x)
        except ValueError:
            continue
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = NORMS[name](functional, mode.from_tensor(x))
        assert fake.stride() == y.stride(), (shape, strides)


@every_path
def test_strides_of_what_was_compiled(path: str) -> None:
    torch._dynamo.reset()
    norm = NORMS["group"]
    step = torch.compile(lambda x: norm(functional, x), backend="aot_eager", fullgraph=True)
    for shape, strides in (GIVEN[0], GIVEN[6]):
        x = of(shape, strides).requires_grad_()
        y, eager = step(x), norm(functional, x)
        assert y.stride() == eager.stride()
        dx, expected = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, eager))
        assert_close((y, dx), (eager, expected), rtol=1e-4, atol=1e-4, check_stride=False)


SIZES_OF_1 = [
    (3, 4, 2, 3), (1, 4, 2, 3), (3, 1, 2, 3), (3, 4, 1, 1), (3, 4, 1, 3), (1, 1, 2, 3),
    (2, 3, 2, 1, 2), (1, 3, 2, 2, 2), (2, 1, 2, 2, 2), (2, 3, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "batch, eval"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SIZES_OF_1, ids=str)
def test_memory_format_in_is_memory_format_out(shape: tuple[int, ...], last: bool, norm: str) -> None:
    """Also where both formats describe the tensor and only the strides of its 1s tell them apart: there torch
    gives contiguous ones."""
    form = FORMATS[len(shape)] if last else torch.contiguous_format
    x = torch.empty(shape, memory_format=form).copy_(data(*shape))
    ours, theirs = (derivatives(f, x, parameters(norm, x)) for f in norms(norm))
    assert_same(ours, theirs)
    assert ours["y"].stride() == ours["dx"].stride() == theirs["y"].stride()
    if shape[1] > 1 and x[0, 0].numel() > 1:
        assert theirs["y"].stride() == theirs["dx"].stride() == x.stride()
