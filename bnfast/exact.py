"""The exact results of a normalization, in fp64, and how far the results of a kernel may be from them.

A result is judged element by element: half a unit in the last place for its final rounding, plus a few units
of the accumulating type times the *scale* of the element, the size of the terms it is a sum of. No bound
grows with the number of values reduced. An error over the whole tensor would hide a wrong tile in the sum of
all others. It is compared with torch's own as well, because a bias that no single element shows appears
there.

A *cell* is a set of values that share a mean and a variance: a channel in BatchNorm, a group of a sample's
channels in GroupNorm. Vectors (means, parameters) keep x's dimensions, with 1 where they do not vary, so that
the formulas below do not depend on cells. Batch Renormalization, which has r * xhat + d in place of xhat, is
a normalization with r * weight and d * weight + bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Units of the accumulating type. Triton's interpreter, which adds sequentially where a GPU adds in a tree,
# needs 3.0 of them (dbias and dweight of up to 80,000 values a channel, fp32 and fp64), so its bound need not
# be wider than a GPU's. torch on a CPU needs up to 44, and thousands where means are large.
FEW = 4.0
# Units in the last place that the root mean square may have beyond twice torch's.
ULPS = 2.0

Value = tuple[Tensor, Tensor]  # a result in fp64, and the scale of each element
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # all of (x, dy) in chunks, as often as asked for


def by_channel(v: Tensor, dims: int) -> Tensor:
    """[C] -> [1, C, 1 ...]."""
    return v.view(1, -1, *[1] * (dims - 2))


@dataclass(frozen=True)
class Exact:
    """A normalization of x and its gradients. Sums are of dy and dy * xhat (gx), norms the roots of the sums
    of their squares; those of `cell` have dy times weight for dy, and are divided by count."""

    mean: Tensor
    variance: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    mean_h: Tensor
    mean_hx: Tensor
    size_h: Tensor
    sum_g: Tensor
    sum_gx: Tensor
    norm_g: Tensor
    norm_gx: Tensor
    drift: Tensor  # what the mean's rounding does to sum_gx
    count: float  # values a cell
    batch: bool  # whether mean and variance are those of x, and not given
    rounded: bool = True  # whether y is computed from a mean that was stored, and so rounded
    offset: Tensor | float = 0.0  # subtracted from x first: all of the above are statistics of x - offset

    @property
    def spread(self) -> Tensor:
        """The effect on xhat of an error of one unit in each of x and the mean. A mean is stored in the
        accumulating type, so its rounding cannot be avoided."""
        return _spread(self.mean + self.offset, self.variance, self.rstd, self.batch)

    def xhat(self, x: Tensor) -> Tensor:
        return (x.double() - self.offset - self.mean) * self.rstd

    def y(self, x: Tensor) -> Value:
        xhat = self.xhat(x)
        spread = self.spread if self.rounded else self.variance.sqrt() * self.rstd
        scale = self.weight.abs() * (xhat.abs() + spread) + self.bias.abs()
        return self.weight * xhat + self.bias, scale

    def dx(self, x: Tensor, dy: Tensor) -> Value:
        h = self.weight * dy.double()
        if not self.batch:
            return self.rstd * h, self.rstd * h.abs()
        xhat = self.xhat(x)
        value = self.rstd * (h - self.mean_h - xhat * self.mean_hx)
        moved = self.spread.clamp_min(1) + xhat.abs() * self.spread  # by the rounding of both means
        return value, self.rstd * (h.abs() + self.size_h * moved)

    def dweight(self) -> Value:
        """The gradient of weight, [channels], as dbias is."""
        return self.sum_gx.flatten(), (self.norm_gx + self.sum_gx.abs() + self.drift).flatten()

    def dbias(self) -> Value:
        return self.sum_g.flatten(), (self.norm_g + self.sum_g.abs()).flatten()

    def running(self, mean: Tensor, variance: Tensor, momentum: float) -> dict[str, Value]:
        """The running statistics after a step that began with these: [cells], which are channels here."""
        old_mean, old_variance = mean.double(), variance.double()
        new_mean, new_variance = self.mean.flatten(), self.variance.flatten()
        unbiased = new_variance * self.count / max(1, self.count - 1)
        kept = 1 - momentum
        size = kept * old_mean.abs() + momentum * (new_mean.abs() + new_variance.sqrt())
        blended = kept * old_variance + momentum * unbiased
        return {
            "running_mean": (kept * old_mean + momentum * new_mean, size),
            "running_var": (blended, blended),
        }


def _sum(t: Tensor, dims: tuple[int, ...], fully: bool) -> Tensor:
    """Sums over dimensions and keeps them. fully: round once only, for results that are sums in fp64
    themselves."""
    if not dims:
        return t  # a sum over no dimensions would be one over all of them
    if not fully:
        return t.sum(dims, keepdim=True)
    shape = [1 if d in dims else n for d, n in enumerate(t.shape)]
    t = t.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
    lost = torch.zeros_like(t)
    while len(t) > 1:  # in pairs, with the rounding error of each addition (Knuth's two-sum)
        half, odd = len(t) // 2, t[2 * (len(t) // 2) :]
        a, b = t[:half], t[half : 2 * half]
        s = a + b
        part = s - a
        error = (a - (s - part)) + (b - part) + lost[:half] + lost[half : 2 * half]
        t, lost = torch.cat((s, odd)), torch.cat((error, lost[2 * half :]))
    return (t + lost).view(shape)


def _spread(mean: Tensor, variance: Tensor, rstd: Tensor, batch: bool) -> Tensor:
    return (variance.sqrt() + mean.abs() * batch) * rstd


def normalization(
    pairs: Pairs,
    cell: tuple[int, ...],
    channel: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fixed: tuple[Tensor, Tensor] | None = None,
    rounded: bool = True,
    offset: Tensor | float = 0.0,
) -> Exact:
    """The exact results of a normalization. cell, channel: the dimensions over which the values of one cell,
    and of one parameter, extend. fixed: mean and variance, where they are not the batch's. Every chunk holds
    a part of each cell: sums over chunks allow for tensors that do not fit into memory in fp64."""
    both = tuple(d for d in cell if d in channel)
    fully = next(iter(pairs()))[0].dtype == torch.float64

    def total(terms: Callable[[Tensor, Tensor], tuple[Tensor, ...]], dims: tuple[int, ...]) -> list[Tensor]:
        sums: list[Tensor] = []
        for x, dy in pairs():
            found = [_sum(t, dims, fully) for t in terms(x.double() - offset, dy.double())]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        return sums

    elements = sum(x.numel() for x, _ in pairs())
    if fixed is None:
        (mean,) = total(lambda x, dy: (x,), cell)
        mean = mean * (mean.numel() / elements)
        (squares,) = total(lambda x, dy: ((x - mean).square(),), cell)
        variance = squares * (mean.numel() / elements)
    else:
        mean, variance = (t.double() for t in fixed)
    rstd = (variance + eps).rsqrt()
    weight = mean.new_ones(()) if weight is None else weight.double()
    bias = mean.new_zeros(()) if bias is None else bias.double()

    def gradient_terms(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        gx = g * (x - mean) * rstd
        return g, gx, g.square(), gx.square()

    # sums over each cell's part of each channel; the sums over cells and over channels are sums of these
    g, gx, squares_g, squares_gx = total(gradient_terms, both)
    count = elements / mean.numel()
    mean_h, mean_hx, squares_h = (
        _sum(t, cell, fully) / count for t in (weight * g, weight * gx, weight.square() * squares_g)
    )
    drift = g.abs() * _spread(mean + offset, variance, rstd, fixed is None)
    by_parameter = (_sum(t, channel, fully) for t in (g, gx, squares_g, squares_gx, drift))
    sum_g, sum_gx, sum_squares_g, sum_squares_gx, drift = by_parameter
    return Exact(
        mean, variance, rstd, weight, bias, mean_h, mean_hx, squares_h.sqrt(),
        sum_g, sum_gx, sum_squares_g.sqrt(), sum_squares_gx.sqrt(), drift, count, fixed is None,
        rounded, offset,
    )  # fmt: skip


def batch_norm(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fixed: tuple[Tensor, Tensor] | None = None,
    pairs: Pairs | None = None,
) -> Exact:
    """BatchNorm of x [N, C, *]; all vectors [C]. pairs: the same in chunks of [N, C, *], of any number of
    dimensions."""
    pairs = pairs or (lambda: [(x, dy)])
    dims = next(iter(pairs()))[0].dim()
    over = (0, *range(2, dims))
    gamma, beta = (None if v is None else by_channel(v.double(), dims) for v in (weight, bias))
    if fixed is not None:
        fixed = (by_channel(fixed[0], dims), by_channel(fixed[1], dims))
    return normalization(pairs, over, over, gamma, beta, eps, fixed)


def by_group(t: Tensor, groups: int) -> Tensor:
    """[N, C, *] -> [N, groups, C / groups, *]."""
    return t.unflatten(1, (groups, t.shape[1] // groups))


def group_normalization(
    x: Tensor,
    dy: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pairs: Pairs | None = None,
) -> Exact:
    """GroupNorm of x [N, C, *], and InstanceNorm, which is C groups; vectors [C]. What it returns goes with
    tensors that `by_group` has split. pairs: the same in chunks, each of some positions of all channels."""
    pairs = pairs or (lambda: [(x, dy)])
    dims = next(iter(pairs()))[0].dim()
    vectors = (None if v is None else by_channel(v.double(), dims) for v in (weight, bias))
    gamma, beta = (None if v is None else by_group(v, groups) for v in vectors)
    cell, channel = tuple(range(2, dims + 1)), (0, *range(3, dims + 1))
    return normalization(
        lambda: ((by_group(x, groups), by_group(dy, groups)) for x, dy in pairs()),
        cell, channel, gamma, beta, eps,
    )  # fmt: skip


def group_norm(
    x: Tensor, dy: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> dict[str, Value]:
    """y, dx, dweight and dbias of group_normalization, in the shapes of x and the vectors."""
    e = group_normalization(x, dy, groups, weight, bias, eps)
    x, dy = by_group(x, groups), by_group(dy, groups)
    y, dx = (tuple(t.expand(x.shape).flatten(1, 2) for t in pair) for pair in (e.y(x), e.dx(x, dy)))
    return {"y": (y[0], y[1]), "dx": (dx[0], dx[1]), "dweight": e.dweight(), "dbias": e.dbias()}


def layer_norm(
    x: Tensor, dy: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> dict[str, Value]:
    """LayerNorm of x over its last `dims` dimensions, which are weight's and bias': y, dx, dweight, dbias.
    A row's mean never leaves the program that normalizes the row, so it is not rounded for y."""
    rest = x.dim() - dims
    shape = x.shape[rest:]
    gamma, beta = (None if v is None else v.double().view(*[1] * rest, *shape) for v in (weight, bias))
    first = x.double().flatten(rest)[..., :1].view(*x.shape[:rest], *[1] * dims)
    rows = tuple(range(rest))
    pairs = [(x, dy)]
    e = normalization(lambda: pairs, tuple(range(rest, x.dim())), rows, gamma, beta, eps, None, False, first)
    (y, y_scale), dx = e.y(x), e.dx(x, dy)
    vectors = {"dweight": e.dweight(), "dbias": e.dbias()}
    shaped = {name: (value.view(shape), scale.view(shape)) for name, (value, scale) in vectors.items()}
    return {"y": (y, y_scale.expand(x.shape)), "dx": dx, **shaped}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of this dtype are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def excess(value: Tensor, expected: Value, accumulating: torch.dtype) -> float:
    """The largest ratio of an element's error to its bound. A result above 1, or NaN, is wrong."""
    exact, scale = expected
    out = torch.finfo(value.dtype)
    # 0.505: a result very close to the middle between two neighbours may round to the other one
    rounding = 0.505 * out.eps * exact.abs() + out.smallest_normal * out.eps
    allowed = rounding + FEW * torch.finfo(accumulating).eps * scale
    share = (value.double() - exact).abs() / allowed
    return share.max().item() if torch.isfinite(value).all() else float("nan")


def rms(value: Tensor, expected: Value) -> float:
    """The error of the worst channel (root mean square) over the root mean square of its scale."""
    exact, scale = expected
    error = value.double() - exact
    if error.dim() > 1:
        dims = [0, *range(2, error.dim())]
        error, scale = error.square().mean(dims).sqrt(), scale.square().mean(dims).sqrt()
    return (error.abs() / scale.clamp_min(1e-300)).max().item()


@dataclass(frozen=True)
class Verdict:
    """The judgement of one result. share: the worst element's error over its bound. limit: the bound of
    rms."""

    share: float
    rms: float
    torch: float  # rms of torch's result
    limit: float

    @property
    def ok(self) -> bool:
        return self.share <= 1 and not self.rms > self.limit  # NaN (torch overflowed) limits nothing

    def __str__(self) -> str:
        return f"{self.share:.2f} of the allowed error, rms {self.rms:.1e} (torch {self.torch:.1e})"


def judge(value: Tensor, torchs: Tensor, expected: Value, accumulating: torch.dtype) -> Verdict:
    """Judges a result, with torch's result for the same input."""
    other = rms(torchs, expected)
    limit = 2 * other + ULPS * torch.finfo(value.dtype).eps
    return Verdict(excess(value, expected, accumulating), rms(value, expected), other, limit)
