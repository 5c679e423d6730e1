"""The exact results of a normalization, in fp64, and how far the results of a kernel may be from them.

A result is judged element by element: half a unit in the last place for its final rounding, plus a few units
of the accumulating type times the *scale* of the element, the size of the terms it is a sum of. No bound
grows with the number of values reduced. An error over the whole tensor would hide a wrong tile in the sum of
all others. It is compared with torch's own as well, because a bias that no single element shows appears
there.

A *group* is a set of values that share a mean and a variance: a channel in BatchNorm, a group of a sample's
channels in GroupNorm. Vectors (means, parameters) keep x's dimensions, with 1 where they do not vary, so that
the formulas below do not depend on groups. Batch Renormalization, which has r * xhat + d in place of xhat, is
a normalization with r * weight and d * weight + bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference.batchnorm import by_channel

# Units of the accumulating type. Triton's interpreter, which adds sequentially where a GPU adds in a tree,
# needs 3.0 of them (dbias and dweight of up to 80,000 values a channel, fp32 and fp64), so its bound need not
# be wider than a GPU's. torch on a CPU needs up to 44, and thousands where means are large.
TOLERANCE = 4.0
# Units in the last place that the root mean square may have beyond twice torch's.
ULPS = 2.0
# Units of the accumulating type that an element and the root mean square may have beyond: of results whose
# approximate divisions were moved on purpose.
MOVED = 0.0

Value = tuple[Tensor, Tensor]  # a result in fp64, and the scale of each element
Terms = tuple[Tensor, ...]
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # all of (x, dy) in chunks, as often as asked for


def _by_group(t: Tensor, groups: int) -> Tensor:
    """[N, C, *] -> [N, groups, C / groups, *], unless groups is 0."""
    return t.unflatten(1, (groups, t.shape[1] // groups)) if groups else t


class Exact:
    """The exact results of a normalization of x and its gradients.

    pairs: every chunk holds a part of each group; sums over chunks allow for tensors that do not fit into
    memory in fp64. group, channel: the dimensions over which the values of one group, and of one parameter,
    extend, with the channels split into `groups`, unless that is 0. fixed: mean and variance, where they are
    not the batch's. rounded: whether y is computed from a mean that was stored, and so rounded. offset: is
    subtracted from x first, and all that is kept here is of x - offset. bias_size: the size of the terms that
    bias is a sum of, if it is one.

    sum_g and sum_gx are a parameter's sums of dy and of dy * xhat, and norm_g and norm_gx the roots of the
    sums of their squares; drift is what the mean's rounding does to sum_gx. mean_h, mean_hx and size_h are
    the same of a group, with weight * dy for dy, divided by `count`, the number of values of a group."""

    def __init__(
        self,
        pairs: Pairs,
        group: tuple[int, ...],
        channel: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        fixed: tuple[Tensor, Tensor] | None = None,
        rounded: bool = True,
        offset: Tensor | float = 0.0,
        groups: int = 0,
        bias_size: Tensor | None = None,
    ) -> None:
        self.batch, self.rounded, self.offset, self.groups = fixed is None, rounded, offset, groups
        fully = next(iter(pairs()))[0].dtype == torch.float64

        def total(terms: Callable[[Tensor, Tensor], Terms], dims: tuple[int, ...]) -> list[Tensor]:
            sums: list[Tensor] = []
            for x, dy in pairs():
                found = [_sum(t, dims, fully) for t in terms(self.seen(x) - offset, self.seen(dy))]
                sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            return sums

        elements = sum(x.numel() for x, _ in pairs())
        if fixed is None:
            (mean,) = total(lambda x, dy: (x,), group)
            mean = mean * (mean.numel() / elements)
            (squares,) = total(lambda x, dy: ((x - mean).square(),), group)
            self.mean, self.variance = mean, squares * (mean.numel() / elements)
        else:
            self.mean, self.variance = (t.double() for t in fixed)
        self.rstd = (self.variance + eps).rsqrt()
        self.weight = self.mean.new_ones(()) if weight is None else weight.double()
        self.bias = self.mean.new_zeros(()) if bias is None else bias.double()
        self.bias_size = self.bias.abs() if bias_size is None else bias_size
        self.count = elements / self.mean.numel()

        def gradient_terms(x: Tensor, g: Tensor) -> Terms:
            gx = g * (x - self.mean) * self.rstd
            return g, gx, g.square(), gx.square()

        # sums over each group's part of each channel; the sums over groups and over channels are sums of
        # these
        both = tuple(d for d in group if d in channel)
        g, gx, squares_g, squares_gx = total(gradient_terms, both)
        of_group = (self.weight * g, self.weight * gx, self.weight.square() * squares_g)
        self.mean_h, self.mean_hx, squares_h = (_sum(t, group, fully) / self.count for t in of_group)
        self.size_h = squares_h.sqrt()
        of_parameter = (g, gx, g.abs() * self.spread, squares_g, squares_gx)
        sums = [_sum(t, channel, fully) for t in of_parameter]
        self.sum_g, self.sum_gx, self.drift = sums[:3]
        self.norm_g, self.norm_gx = (t.sqrt() for t in sums[3:])

    @property
    def spread(self) -> Tensor:
        """The effect on xhat of an error of one unit in each of x and the mean. A mean is stored in the
        accumulating type, so its rounding cannot be avoided."""
        return (self.variance.sqrt() + (self.mean + self.offset).abs() * self.batch) * self.rstd

    def seen(self, t: Tensor) -> Tensor:
        """x, or a tensor of its shape, in fp64 and as the formulas see it."""
        return _by_group(t.double(), self.groups)

    def as_x(self, t: Tensor) -> Tensor:
        """The inverse of `seen`."""
        return t.flatten(1, 2) if self.groups else t

    def xhat(self, x: Tensor) -> Tensor:
        """x: as seen."""
        return (x - self.offset - self.mean) * self.rstd

    def y(self, x: Tensor) -> Value:
        xhat = self.xhat(self.seen(x))
        spread = self.spread if self.rounded else self.variance.sqrt() * self.rstd
        scale = self.weight.abs() * (xhat.abs() + spread) + self.bias_size
        return self.as_x(self.weight * xhat + self.bias), self.as_x(scale)

    def dx(self, x: Tensor, dy: Tensor) -> Value:
        h = self.weight * self.seen(dy)
        if not self.batch:
            return self.as_x(self.rstd * h), self.as_x(self.rstd * h.abs())
        xhat = self.xhat(self.seen(x))
        value = self.rstd * (h - self.mean_h - xhat * self.mean_hx)
        moved = self.spread.clamp_min(1) + xhat.abs() * self.spread  # by the rounding of both means
        return self.as_x(value), self.as_x(self.rstd * (h.abs() + self.size_h * moved))

    def results(self, x: Tensor, dy: Tensor) -> dict[str, Value]:
        return {"y": self.y(x), "dx": self.dx(x, dy), "dweight": self.dweight(), "dbias": self.dbias()}

    def dweight(self) -> Value:
        """The gradient of weight, [channels], as dbias is."""
        return self.sum_gx.flatten(), (self.norm_gx + self.sum_gx.abs() + self.drift).flatten()

    def dbias(self) -> Value:
        return self.sum_g.flatten(), (self.norm_g + self.sum_g.abs()).flatten()

    def running(self, mean: Tensor, variance: Tensor, momentum: float) -> dict[str, Value]:
        """The running statistics after a step that began with these: [groups], which are channels here."""
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


def batch_norm(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fixed: tuple[Tensor, Tensor] | None = None,
    pairs: Pairs | None = None,
    groups: int = 0,
    bias_size: Tensor | None = None,
) -> Exact:
    """BatchNorm of x [N, C, *]; all vectors [C]. pairs: the same in chunks of [N, C, *], of any number of
    dimensions. groups: those of GroupNorm, whose chunks are some positions of all channels; InstanceNorm has
    as many as channels."""
    pairs = pairs or (lambda: [(x, dy)])
    part, _ = next(iter(pairs()))
    dims = part.dim()
    channel = (0, *range(3, dims + 1)) if groups else (0, *range(2, dims))
    group = tuple(range(2, dims + 1)) if groups else channel
    vectors = (None if v is None else by_channel(v, part) for v in (weight, bias, bias_size))
    gamma, beta, size = (None if v is None else _by_group(v, groups) for v in vectors)
    if fixed is not None:
        fixed = (by_channel(fixed[0], part), by_channel(fixed[1], part))
    return Exact(pairs, group, channel, gamma, beta, eps, fixed, groups=groups, bias_size=size)


def layer_norm(x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Exact:
    """LayerNorm of x over its last dimension. A row's mean never leaves the program that normalizes the row,
    so it is not rounded for y."""
    last, first = x.dim() - 1, x[..., :1].double()
    return Exact(
        lambda: [(x, dy)], (last,), tuple(range(last)), weight, bias, eps, rounded=False, offset=first
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of this dtype are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def error_ratio(value: Tensor, expected: Value, accumulating: torch.dtype) -> float:
    """The largest ratio of an element's error to its bound. A result above 1, or NaN, is wrong."""
    exact, scale = expected
    out = torch.finfo(value.dtype)
    # 0.505: a result very close to the middle between two neighbours may round to the other one
    rounding = 0.505 * out.eps * exact.abs() + out.smallest_normal * out.eps
    allowed = rounding + (TOLERANCE + MOVED) * torch.finfo(accumulating).eps * scale
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
    limit = 2 * other + ULPS * torch.finfo(value.dtype).eps + MOVED * torch.finfo(accumulating).eps
    return Verdict(error_ratio(value, expected, accumulating), rms(value, expected), other, limit)
