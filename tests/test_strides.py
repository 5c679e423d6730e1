"""Tensors that lie in memory in unusual ways: values and gradients are torch's, and so are the output's
strides, because what follows may draw random numbers by them or go on in their format. torch judges on copies
in canonical strides, as its own backward trusts strides that fit two memory formats."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import bnfast
from bnfast import functional
from bnfast.checks.cases import FORMATS
from tests.support import layers
from tests.support.layers import data, every_path, statistics

EPS = 1e-3
NORMS: dict[str, Callable[..., Tensor]] = {
    **layers.NORMS,
    "group, each channel": lambda f, x, w=None, b=None, **after: f.group_norm(x, x.shape[1], w, b, **after),
    "instance, tracking": lambda f, x, w=None, b=None, **after: f.instance_norm(
        x, *statistics(x), w, b, **after
    ),
    "layer, samples": lambda f, x, w=None, b=None, **after: f.layer_norm(x, x.shape[1:], w, b, **after),
}


def format_of(t: Tensor, last: bool = True) -> torch.memory_format:
    return FORMATS.get(t.dim(), torch.contiguous_format) if last else torch.contiguous_format


def reversed_strides(t: Tensor) -> Tensor:
    """The last dimension outermost: with sizes of 1, the strides fit both formats or only seem to."""
    dims = list(range(t.dim()))[::-1]
    return t.permute(dims).contiguous().permute(dims)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=format_of(t)),
    "reversed": reversed_strides,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels sliced": lambda t: LAYOUTS["channels_last"](torch.cat((t, t), 1))[:, : t.size(1)],
    "expanded": lambda t: t.mean(tuple(range(2, t.dim())), True).expand(t.shape),
}
SHAPES = [
    (1, 3, 4, 5), (1, 3, 1, 3), (1, 3, 3, 1), (1, 1, 2, 3), (2, 6, 2, 3), (2, 3, 1, 3),
    (1, 3, 2, 1, 3), (1, 3, 2, 3, 2),
]  # fmt: skip
# In contiguous and in channels_last memory only the strides of the 1s may tell the two formats apart.
SIZES_OF_1 = [
    (3, 4, 2, 3), (1, 4, 2, 3), (3, 1, 2, 3), (3, 4, 1, 1), (3, 4, 1, 3), (1, 1, 2, 3),
    (2, 3, 2, 1, 2), (1, 3, 2, 2, 2), (2, 1, 2, 2, 2), (2, 3, 1, 1, 1),
]  # fmt: skip
# What reshapes, slices and unsqueezes leave: a shape, and strides
GIVEN: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = [
    ((1, 4, 3, 2), [(4, 1, 8, 4)]),  # after attention: channels_last but for the sample's stride
    ((1, 4, 3, 2), [(24, 1, 8, 4), (7, 6, 2, 1)]),
    ((2, 4, 3, 2), [(24, 1, 8, 4), (48, 12, 4, 2), (48, 1, 16, 8)]),  # the last: channels are sliced
    ((3, 2, 1, 2), [(4, 1, 4, 2), (4, 1, 2, 2)]),  # channels_last but for the height's stride
    ((2, 4, 1, 1), [(4, 1, 4, 4), (4, 1, 1, 1)]),  # both formats
    ((2, 1, 3, 2), [(6, 1, 2, 1), (6, 6, 2, 1)]),
    ((2, 3, 4, 2), [(24, 8, 1, 4), (8, 0, 2, 1)]),  # neither format
    ((1, 3, 2, 2, 2), [(3, 1, 12, 6, 3), (24, 1, 12, 6, 3)]),
    ((2, 3, 1, 2, 2), [(12, 1, 3, 6, 3)]),
    ((2, 3, 4), [(24, 8, 2)]),
    ((1, 3, 4), [(5, 4, 1), (3, 1, 3)]),
    ((3, 1), [(1, 9)]),
    ((1, 1, 1), [(8, 4, 2)]),  # one value
    ((1, 1, 1, 1), [(8, 2, 4, 2), (8, 4, 2, 2)]),
]


def of(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return data(size, dtype=torch.float64).as_strided(shape, strides)


def given() -> Iterator[Tensor]:
    return (of(shape, strides) for shape, several in GIVEN for strides in several)


def more(count: int) -> Iterator[Tensor]:
    """Random shapes and strides, with many sizes of 1."""
    pick = random.Random(0)
    for _ in range(count):
        dims = pick.choice([4, 4, 5])
        shape, strides, step = [pick.choice([1, 1, 2, 3]) for _ in range(dims)], [0] * dims, 1
        order = pick.choice([list(range(dims)), [0, *range(2, dims), 1], pick.sample(range(dims), dims)])
        for d in reversed(order):
            strides[d], step = step, step * shape[d]
        strides = [pick.choice([1, 2, 6, s]) if n == 1 else s for n, s in zip(shape, strides, strict=True)]
        if max(shape) > 1:
            yield of(shape, strides)


def pairs(path: str) -> Iterator[tuple[Tensor, Tensor]]:
    """x and dy. Every layout of x meets every layout of dy in plain torch, which is quick enough for that."""
    strided = [*given(), *more(80 if path == "torch" else 0)]
    for shape, last in itertools.product(SIZES_OF_1, (False, True)):
        x = data(*shape, dtype=torch.float64)
        strided.append(torch.empty_like(x, memory_format=format_of(x, last)).copy_(x))
    dys = itertools.cycle(LAYOUTS.values()) if path == "torch" else itertools.repeat(Tensor.contiguous)
    for x, lay in zip(strided, dys, strict=False):
        yield x, lay(data(*x.shape, seed=5, dtype=x.dtype))
    for shape in SHAPES if path == "torch" else ():
        for lay_x, lay_dy in itertools.product(LAYOUTS.values(), repeat=2):
            x, dy = (data(*shape, seed=seed, dtype=torch.float64) for seed in (0, 5))
            yield lay_x(x), lay_dy(dy)


def normalized(
    f: Any, name: str, x: Tensor, w: Tensor | None = None, b: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """The result of bnfast.functional or torch.nn.functional. With a residual, silu follows."""
    if z is None or f is F:
        y = NORMS[name](f, x, w, b, eps=EPS)
        return y if z is None else F.silu(y + z)
    return NORMS[name](f, x, w, b, eps=EPS, activation="silu", residual=z)


def canonical(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def derivatives(function: Callable[..., Tensor], dy: Tensor, *given: Tensor) -> list[Tensor]:
    """The output and the gradients of all that is given, which is not copied."""
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def expected_strides(name: str, x: Tensor) -> tuple[int, ...]:
    """torch's strides. InstanceNorm, however, returns channels_last where x is that and nothing else."""
    if name.startswith("instance") and x.dim() in FORMATS and not x.is_contiguous():
        last = torch.empty(x.shape, memory_format=format_of(x)).stride()
        if x.is_contiguous(memory_format=format_of(x)) and F.group_norm(x, 1).stride() == last:
            return last
    return NORMS[name](F, x).stride()


@pytest.mark.parametrize(
    ("path", "after"),
    [("kernels", "affine"), ("torch", "bare"), ("torch", "affine, residual and silu")],
    indirect=["path"],
)
@pytest.mark.parametrize("name", NORMS)
def test_values_gradients_and_strides(name: str, after: str, path: str, launches: list[Any]) -> None:
    wrong = []
    for x, dy in pairs(path):
        vector = {"layer": x.shape[-1:], "layer, samples": x.shape[1:]}.get(name, x.shape[1:2])
        leaves = [x, *(data(*vector, seed=n, dtype=x.dtype) for n in (1, 2) if after != "bare")]
        leaves += [dy.flip(1)] if "silu" in after else []
        ours, theirs = (functools.partial(normalized, f, name) for f in (functional, F))
        try:
            expected = derivatives(theirs, *map(canonical, (dy, *leaves)))
        except ValueError:  # a group has one value
            continue
        before = [t.clone() for t in leaves]
        found = derivatives(ours, dy, *leaves)
        what = f"x {tuple(x.shape)} {x.stride()}, dy {dy.stride()}"
        assert all(map(torch.equal, leaves, before)), what
        for key, value, true in zip(("y", "dx", "dw", "db", "dz"), found, expected, strict=False):
            if not torch.allclose(value, true, rtol=1e-9, atol=1e-9):
                wrong.append(f"{key} of {what}")
        y, dx, *_ = found
        if "silu" not in after and y.stride() != expected_strides(name, x):
            wrong.append(f"{what}: y {y.stride()}, not {expected_strides(name, x)}")
        if path == "kernels" and dx.stride() != y.stride():
            wrong.append(f"{what}: dx {dx.stride()}, not {y.stride()}")
    assert bool(launches) == (path == "kernels")
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:20])


@pytest.mark.parametrize("name", NORMS)
def test_strides_on_fake_tensors(name: str) -> None:
    for x in given():
        try:
            y = NORMS[name](functional, x)
        except ValueError:
            continue
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = NORMS[name](functional, mode.from_tensor(x))
        assert fake.stride() == y.stride(), (x.shape, x.stride())


@every_path
def test_strides_of_what_was_compiled(path: str) -> None:
    torch._dynamo.reset()
    norm = NORMS["group"]
    step = torch.compile(lambda x: norm(functional, x), backend="aot_eager", fullgraph=True)
    for x in (of((1, 4, 3, 2), (4, 1, 8, 4)), of((3, 2, 1, 2), (4, 1, 2, 2))):
        dy = data(*x.shape, seed=5, dtype=x.dtype)
        found, eager = (derivatives(f, dy, x) for f in (step, lambda x: norm(functional, x)))
        assert found[0].stride() == eager[0].stride()
        assert_close(found, eager, check_stride=False)


def slope(f: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    return grad(lambda x: (f(x) * dy).sum())(x)


WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "compiled": lambda f, x, dy: derivatives(torch.compile(f, backend="aot_eager", fullgraph=True), dy, x)[1],
    "traced": lambda f, x, dy: derivatives(torch.jit.trace(f, x), dy, x)[1],
    "exported": lambda f, x, dy: derivatives(torch.export.export(f, (x,)).module(), dy, x)[1],
    "grad": slope,
    "grad of grad": lambda f, x, dy: slope(lambda x: slope(f, x, dy), x, dy),
    "vmap(grad)": lambda f, x, dy: vmap(lambda x, dy: slope(lambda x: f(x[None]), x, dy[None]))(x, dy),
    "jvp": lambda f, x, dy: jvp(f, (x,), (dy,))[1],
}


@pytest.mark.filterwarnings("ignore")  # deprecated, and traced conditions
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_one_sample_of_instance_norm(way: Any, plain_torch: None) -> None:
    """Its channels_last gradient could pass for contiguous, in graphs and beneath transforms too."""
    torch._dynamo.reset()
    x, dy = (data(1, 3, 4, 5, seed=seed, dtype=torch.float64, last=True) for seed in (0, 5))
    expected = way(nn.InstanceNorm2d(3), canonical(x), canonical(dy))
    assert_close(way(bnfast.InstanceNorm2d(3), x, dy), expected, check_stride=False)
