"""Tensors that lie in memory in unusual ways, or whose memory does not hold their values: results are as
torch's, and so are the output's strides, because what follows may draw random numbers by them or go on in
their format. torch judges on copies in canonical strides, as its own backward trusts strides that fit two
memory formats."""

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
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import bnfast
from bnfast import functional
from bnfast.checks.cases import FORMATS, placed
from tests.support import layers
from tests.support.buffers import shifted
from tests.support.layers import assert_same, call_of, data, derivatives, every_path, norms, statistics
from tests.support.versions import TORCH

EPS = 1e-3
NORMS: dict[str, Callable[..., Tensor]] = {
    **layers.NORMS,
    "group, each channel": call_of("group_norm", lambda x: (x.shape[1],)),
    "instance, tracking": call_of("instance_norm", statistics),
    "layer, samples": call_of("layer_norm", lambda x: (x.shape[1:],)),
}


def in_format(t: Tensor, last: bool = True) -> Tensor:
    """Contiguous, or channels_last where there is such a thing, in its own strides for sizes of 1 too."""
    memory_format = FORMATS.get(t.dim(), torch.contiguous_format) if last else torch.contiguous_format
    return torch.empty_like(t, memory_format=memory_format).copy_(t)


def reversed_strides(t: Tensor) -> Tensor:
    """The last dimension outermost: with sizes of 1, the strides fit both formats or only seem to."""
    dims = list(range(t.dim()))[::-1]
    return t.permute(dims).contiguous().permute(dims)


def strided(t: Tensor) -> Tensor:
    """Every second element of a row."""
    other = torch.full_like(t, float("nan")) if t.is_floating_point() else ~t
    return torch.stack((t, other), -1)[..., 0]


# In plain torch each of these for x meets each for dy, where sizes of 1 leave two formats possible.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: in_format(t, last=False),
    "channels_last": in_format,
    "reversed": reversed_strides,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels sliced": lambda t: in_format(torch.cat((t, t), 1))[:, : t.size(1)],
    "expanded": lambda t: t.mean(tuple(range(2, t.dim())), True).expand(t.shape),
}
FURTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "samples transposed": lambda t: placed(t, "transposed"),
    "sliced": lambda t: placed(t, "sliced"),
    "strided": strided,
    "unaligned": lambda t: shifted(t.contiguous(), 1),
    "unaligned channels_last": lambda t: shifted(in_format(t), 1),
    "expanded over N": lambda t: t[:1].expand(t.shape),
    "expanded over C": lambda t: t[:, :1].expand(t.shape),
    "expanded to all": lambda t: t.flatten()[0].expand(t.shape),  # as y.sum() leaves dy
    "negated": lambda t: torch._neg_view(-t),  # as the imaginary part of a conjugate
    "negated channels_last": lambda t: torch._neg_view(-in_format(t)),
}
# What autograd makes up for an output that nobody used
NO_GRADIENT = {"zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)}
# In contiguous and in channels_last memory only the strides of the 1s may tell the two formats apart.
SHAPES = [
    (1, 3, 4, 5), (1, 3, 1, 3), (1, 3, 3, 1), (1, 1, 2, 3), (2, 6, 2, 3), (2, 3, 1, 3), (3, 1, 2, 3),
    (3, 4, 1, 1), (1, 3, 2, 1, 3), (1, 3, 2, 3, 2), (2, 3, 2, 1, 2), (2, 1, 2, 2, 2), (2, 3, 1, 1, 1),
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
    ((2, 3, 2, 3, 4), [(72, 3, 36, 1, 9)]),
    ((2, 3, 4), [(24, 8, 2), (12, 1, 3)]),
    ((12, 7), [(1, 12)]),
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


def pairs(path: str) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """x, and the layout of what has its shape: dy and the residual."""
    several = [*given(), *more(80 if path == "torch" else 0)]
    yield from zip(several, itertools.cycle(LAYOUTS.values()))
    of_x, of_dy = list(LAYOUTS.values()), list(LAYOUTS.values())
    if path == "kernels":  # the interpreter has no time for every pair, nor have the kernels a use for it
        of_x, of_dy = of_x[:2], of_dy[:1]
    for shape, layout, other in itertools.product(SHAPES, of_x, of_dy):
        yield layout(data(*shape, dtype=torch.float64)), other
    x = data(3, 4, 2, 3, dtype=torch.float64)
    for layout in (LAYOUTS | FURTHER).values():
        yield layout(x), LAYOUTS["contiguous"]
    for layout, last in itertools.product((LAYOUTS | FURTHER | NO_GRADIENT).values(), (False, True)):
        yield in_format(x, last), layout


def canonical(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def expected_strides(name: str, x: Tensor) -> tuple[int, ...]:
    """torch's strides. InstanceNorm, however, returns channels_last where x is that and nothing else."""
    if name.startswith("instance") and x.dim() in FORMATS and not x.is_contiguous():
        last = in_format(x).stride()
        if x.is_contiguous(memory_format=FORMATS[x.dim()]) and F.group_norm(x, 1).stride() == last:
            return last
    return NORMS[name](F, x).stride()


@pytest.mark.parametrize(
    ("path", "affine", "activation"),
    [("kernels", True, None), ("kernels", True, "relu"), ("torch", False, None), ("torch", True, "silu")],
    indirect=["path"],
)
@pytest.mark.parametrize("name", NORMS)
def test_values_gradients_and_strides(
    name: str, affine: bool, activation: str | None, path: str, launches: list[Any]
) -> None:
    """With a residual where an activation follows."""
    wrong = []
    for x, layout in pairs(path):
        vector = {"layer": x.shape[-1:], "layer, samples": x.shape[1:]}.get(name, x.shape[1:2])
        dy, residual = (layout(data(*x.shape, seed=seed, dtype=x.dtype)) for seed in (5, 7))
        if TORCH == (2, 11) and "group" in name and path == "torch" and dy._is_zerotensor():
            continue  # this PyTorch's own backward leaves dx as it finds it
        rest = [data(*vector, seed=n, dtype=x.dtype) for n in (1, 2) if affine]
        rest += [residual] if activation else []
        ours, theirs = (functools.partial(f, activation=activation, eps=EPS) for f in norms(NORMS[name]))
        try:
            expected = derivatives(theirs, canonical(x), [*map(canonical, rest)], canonical(dy))
        except ValueError:  # a group has one value
            continue
        before = [t.clone() for t in (x, *rest)]
        found = derivatives(ours, x, rest, dy)
        what = f"x {tuple(x.shape)} {x.stride()}, dy {dy.stride()}"
        assert all(map(torch.equal, (x, *rest), before)), what
        for key, true in expected.items():
            if not torch.allclose(found[key], true, rtol=1e-9, atol=1e-9):
                wrong.append(f"{key} of {what}")
        y, dx = found["y"], found["dx"]
        if activation is None and y.stride() != expected_strides(name, x):
            wrong.append(f"{what}: y {y.stride()}, not {expected_strides(name, x)}")
        if path == "kernels" and not x.is_neg() and dx.stride() != y.stride():
            wrong.append(f"{what}: dx {dx.stride()}, not {y.stride()}")
    assert bool(launches) == (path == "kernels")
    assert not wrong, f"{len(wrong)}: " + "\n".join(wrong[:20])


UNPACKED = [
    (last, layout)
    for last in (False, True)
    for layout in ("strided", "unaligned", "reversed", "contiguous" if last else "channels_last")
]


@pytest.mark.parametrize(("last", "layout"), UNPACKED)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("width", [8, 7])
@layers.every_norm
def test_saved_tensors_come_back_in_other_memory(
    norm: str, width: int, activation: str | None, layout: str, last: bool
) -> None:
    """Hooks that offload or compress need not keep the strides of what they were given."""
    x, ours, unpacked = data(2, 8, 4, width, last=last), norms(norm)[0], []
    rest = layers.parameters(norm, x, activation)
    expected = derivatives(ours, x, rest, activation=activation)

    def back(t: Tensor) -> Tensor:
        unpacked.append(t)
        return (LAYOUTS | FURTHER)[layout](t) if t.numel() else t

    with saved_tensors_hooks(torch.clone, back):
        found = derivatives(ours, x, rest, activation=activation)
    assert len(unpacked) >= 3
    mask = activation == "relu" and norm != "layer"
    bits = last or width == 8  # neighbours that share a byte
    assert any(t.dtype == (torch.uint8 if bits else torch.bool) for t in unpacked) == mask
    assert_same(found, expected, check_stride=False)


@pytest.mark.parametrize("name", NORMS)
def test_strides_on_fake_tensors(name: str) -> None:
    """Of a step that never ran."""
    function = functools.partial(NORMS[name], functional)
    for x in given():
        try:
            real = derivatives(function, x, [])
        except ValueError:
            continue
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = derivatives(function, mode.from_tensor(x), [])
        for key, t in real.items():
            assert (fake[key].shape, fake[key].stride()) == (t.shape, t.stride()), (key, x.shape, x.stride())


@every_path
def test_strides_of_what_was_compiled(path: str) -> None:
    torch._dynamo.reset()
    norm = NORMS["group"]
    step = torch.compile(lambda x: norm(functional, x), backend="aot_eager", fullgraph=True)
    for x in (of((1, 4, 3, 2), (4, 1, 8, 4)), of((3, 2, 1, 2), (4, 1, 2, 2))):
        dy = data(*x.shape, seed=5, dtype=x.dtype)
        found, eager = (derivatives(f, x, [], dy) for f in (step, lambda x: norm(functional, x)))
        assert found["y"].stride() == eager["y"].stride()
        assert_same(found, eager, check_stride=False)


def slope(f: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    return grad(lambda x: (f(x) * dy).sum())(x)


WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "compiled": lambda f, x, dy: derivatives(
        torch.compile(f, backend="aot_eager", fullgraph=True), x, [], dy
    )["dx"],
    "traced": lambda f, x, dy: derivatives(torch.jit.trace(f, x), x, [], dy)["dx"],
    "exported": lambda f, x, dy: derivatives(torch.export.export(f, (x,)).module(), x, [], dy)["dx"],
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
