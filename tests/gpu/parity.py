"""What the GPU tests share: a case, its tensors, the truth in fp64, and the judgement of a result.

Error is judged element by element against fp64: half a unit in the last place for the final rounding, plus
a FEW units of the accumulating type times the *scale* of the element, the size of the terms it is a sum of.
No bound grows with the number of values reduced. A mean is kept in the accumulating type, so its rounding,
seen through x - mean, is part of the scale ("spread"). On top of that, the error may be at most twice torch's
own at the same dtype, plus two units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bnfast
from bnfast.dispatch import INTERPRET
from tests.support.buffers import bit_identical, nan_filled_allocations

FEW = 4.0
LAYERS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def device() -> torch.device:
    return torch.device("cuda")


def unfit() -> str | None:
    """Why these tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return "needs compiled kernels: unset TRITON_INTERPRET" if INTERPRET else None


@dataclass(frozen=True)
class Case:
    """One layer and one input. storage and gradient say how x and dy lie in memory: see `placed`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    training: bool = True
    mean: float = 0.5
    affine: bool = True
    bias: bool = True
    tracked: bool = True
    parameters: torch.dtype | None = None  # None: fp32, and fp64 for fp64 input
    momentum: float | None = 0.1
    eps: float = 1e-5
    storage: str = "dense"
    gradient: str = "dense"
    seed: int = 0

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        words += ["nhwc"] * self.channels_last + ["train" if self.training else "eval"]
        for key, usual in USUAL.items():
            value = getattr(self, key)
            if value != usual:
                words.append(f"{key}={value}".replace("torch.", ""))
        return "-".join(words)

    @property
    def batch(self) -> bool:
        """Whether the batch's own statistics are used."""
        return self.training or not self.tracked

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


_DEFAULT = Case((1, 1))
USUAL = {
    key: getattr(_DEFAULT, key)
    for key in ("mean", "affine", "bias", "tracked", "parameters", "momentum", "eps", "storage", "gradient")
}


def placed(t: Tensor, how: str, channels_last: bool = False) -> Tensor:
    """The values of t, lying in memory as said.

    dense: in the layout's own order. offset: the same, one element past a 16-byte boundary. sliced: a view
    into something wider. transposed: N and C have changed places. expanded: one value, stride 0 everywhere.
    """
    if how == "expanded":
        return t.new_tensor(0.75).expand(t.shape)
    if how == "sliced":
        wider = t.new_zeros((t.shape[0], t.shape[1] + 2, *t.shape[2:]))
        view = placed(wider, "dense", channels_last)[:, 1:-1]
        return view.copy_(t)
    if how == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if channels_last and t.dim() in FORMATS:
        t = t.contiguous(memory_format=FORMATS[t.dim()])
    if how == "offset":
        return t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
    return t


@dataclass(frozen=True)
class Given:
    """The tensors that a case starts from."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {key: value for key, value in vars(self).items() if value is not None}


def given(case: Case) -> Given:
    channels = case.shape[1]
    generator = torch.Generator(device()).manual_seed(case.seed + 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device(), dtype=torch.float64)

    # Every channel has its own mean, or a kernel that mixes channels up would go unseen. No weight is near 0.
    spread = torch.linspace(0.9, 1.1, channels, device=device(), dtype=torch.float64)
    x = (random(*case.shape) + case.mean * by_channel(spread, len(case.shape))).to(case.dtype)
    dy = random(*case.shape).to(case.dtype)
    weight = random(channels)
    vectors = (
        weight + 0.5 * weight.sign(),
        random(channels),
        case.mean * spread + random(channels),
        random(channels).square() + 0.5,
    )
    parameters = case.parameters or case.accumulator
    how = "offset" if case.storage == "offset" else "dense"
    weight, bias, running_mean, running_var = (placed(v.to(parameters), how) for v in vectors)
    return Given(
        placed(x, case.storage, case.channels_last),
        placed(dy, case.gradient, case.channels_last),
        weight if case.affine else None,
        bias if case.affine and case.bias else None,
        running_mean,
        running_var,
    )


def layer(case: Case, library: Any, tensors: Given) -> nn.Module:
    """bnfast's layer or torch.nn's, with these parameters, and running statistics of its own to write to."""
    module = getattr(library, LAYERS[len(case.shape)])(
        case.shape[1], case.eps, case.momentum, case.affine, case.tracked, device=device()
    )
    if case.affine:
        module.weight = nn.Parameter(tensors.weight)
        module.bias = None if tensors.bias is None else nn.Parameter(tensors.bias)
    if case.tracked:
        how = "offset" if case.storage == "offset" else "dense"
        module.running_mean = placed(tensors.running_mean.clone(), how)
        module.running_var = placed(tensors.running_var.clone(), how)
        module.num_batches_tracked.fill_(3)
    return module.train(case.training)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Forward and backward: the output and all gradients. Running statistics are left in the module."""
    x = x.detach().requires_grad_()
    y = module(x)
    wanted = {"dx": x, "dweight": module.weight, "dbias": module.bias}
    wanted = {name: t for name, t in wanted.items() if t is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.named_buffers() if t is not None}


def run(case: Case, library: Any, tensors: Given) -> dict[str, Tensor]:
    """All that one step returns and writes."""
    module = layer(case, library, tensors)
    return {**step(module, tensors.x, tensors.dy), **buffers(module)}


def by_channel(v: Tensor, dims: int) -> Tensor:
    return v.view(1, -1, *[1] * (dims - 2))


@dataclass(frozen=True)
class Truth:
    """BatchNorm in fp64, from sums over chunks: it also serves tensors that do not fit the memory in fp64."""

    mean: Tensor
    variance: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    sum_g: Tensor  # of dy, and of dy * xhat; norms are the roots of the sums of their squares
    sum_gx: Tensor
    norm_g: Tensor
    norm_gx: Tensor
    count: int
    batch: bool

    @property
    def spread(self) -> Tensor:
        """How much of x - mean, in standard deviations, a relative error of the mean can come to."""
        return 1 + self.mean.abs() * self.rstd * self.batch

    def xhat(self, x: Tensor) -> Tensor:
        return (x.double() - by_channel(self.mean, x.dim())) * by_channel(self.rstd, x.dim())

    def y(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(value, scale), like the three below."""
        weight, bias, spread = (by_channel(v, x.dim()) for v in (self.weight, self.bias, self.spread))
        xhat = self.xhat(x)
        return weight * xhat + bias, weight.abs() * (xhat.abs() + spread) + bias.abs()

    def dx(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        factor = by_channel(self.weight * self.rstd, x.dim())
        g = g.double()
        if not self.batch:
            return factor * g, factor.abs() * g.abs()
        xhat = self.xhat(x)
        n = self.count
        sizes = (self.sum_g / n, self.sum_gx / n, self.norm_g / n**0.5 * self.spread)
        mean_g, mean_gx, size = (by_channel(v, x.dim()) for v in sizes)
        return factor * (g - mean_g - xhat * mean_gx), factor.abs() * (g.abs() + (1 + xhat.abs()) * size)

    def dweight(self) -> tuple[Tensor, Tensor]:
        return self.sum_gx, self.norm_gx + self.sum_gx.abs() + self.sum_g.abs() * self.spread

    def dbias(self) -> tuple[Tensor, Tensor]:
        return self.sum_g, self.norm_g + self.sum_g.abs()


def truth(case: Case, tensors: Given, pairs: Pairs | None = None) -> Truth:
    """pairs: chunks of (x, dy), [N, C, *] each, gone through up to three times; without, all at once."""
    pairs = pairs or (lambda: [(tensors.x, tensors.dy)])
    channels, count = case.shape[1], tensors.x.numel() // case.shape[1]

    def total(terms: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        sums: list[Tensor] = []
        for x, g in pairs():
            dims = [0, *range(2, x.dim())]
            found = [t.sum(dims) for t in terms(x.double(), g.double())]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        return sums

    if case.batch:
        mean = total(lambda x, g: (x,))[0] / count
        variance = total(lambda x, g: ((x - by_channel(mean, x.dim())).square(),))[0] / count
    else:
        mean, variance = tensors.running_mean.double(), tensors.running_var.double()
    rstd = (variance + case.eps).rsqrt()

    def gradient_terms(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        xhat = (x - by_channel(mean, x.dim())) * by_channel(rstd, x.dim())
        return g, g * xhat, g.square(), (g * xhat).square()

    sum_g, sum_gx, squares_g, squares_gx = total(gradient_terms)
    weight = mean.new_ones(channels) if tensors.weight is None else tensors.weight.double()
    bias = mean.new_zeros(channels) if tensors.bias is None else tensors.bias.double()
    norms = (squares_g.sqrt(), squares_gx.sqrt())
    return Truth(mean, variance, rstd, weight, bias, sum_g, sum_gx, *norms, count, case.batch)


def running(case: Case, tensors: Given, exact: Truth) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, scale) of the running statistics after a step in training that started at 3 batches."""
    factor = 1 / 4 if case.momentum is None else case.momentum
    unbiased = exact.variance * exact.count / max(1, exact.count - 1)
    old_mean, old_var = tensors.running_mean.double(), tensors.running_var.double()
    mean_scale = (1 - factor) * old_mean.abs() + factor * (exact.mean.abs() + exact.variance.sqrt())
    var = (1 - factor) * old_var + factor * unbiased
    return {
        "running_mean": ((1 - factor) * old_mean + factor * exact.mean, mean_scale),
        "running_var": (var, var),
    }


def excess(case: Case, value: Tensor, exact: Tensor, scale: Tensor) -> float:
    """The largest error of any element as a share of what it may be: above 1, or NaN, is wrong."""
    out = torch.finfo(value.dtype)
    rounding = 0.505 * out.eps * exact.abs() + out.smallest_normal * out.eps
    allowed = rounding + FEW * torch.finfo(case.accumulator).eps * scale
    share = (value.double() - exact).abs() / allowed
    return share.max().item() if torch.isfinite(value).all() else float("nan")


def rms(value: Tensor, exact: Tensor, scale: Tensor) -> float:
    """The error of the worst channel (root mean square) over the root mean square of its scale."""
    error = value.double() - exact
    if error.dim() > 1:
        dims = [0, *range(2, error.dim())]
        error, scale = error.square().mean(dims).sqrt(), scale.square().mean(dims).sqrt()
    return (error.abs() / scale.clamp_min(1e-300)).max().item()


def expectations(case: Case, tensors: Given) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, scale) of everything that a step returns or writes, but for the batch counter."""
    exact = truth(case, tensors)
    expected = {"y": exact.y(tensors.x), "dx": exact.dx(tensors.x, tensors.dy)}
    if tensors.weight is not None:
        expected["dweight"] = exact.dweight()
    if tensors.bias is not None:
        expected["dbias"] = exact.dbias()
    if case.tracked:
        kept = {name: getattr(tensors, name).double() for name in ("running_mean", "running_var")}
        unchanged = {name: (t, t.abs()) for name, t in kept.items()}
        expected |= running(case, tensors, exact) if case.training else unchanged
    return expected


def check(case: Case) -> None:
    """One step of bnfast's layer is right, looks as torch's does, and leaves its inputs alone."""
    tensors = given(case)
    before = {name: t.clone() for name, t in tensors.tensors().items()}
    with nan_filled_allocations():  # what a kernel forgets to write is NaN
        ours = run(case, bnfast, tensors)
    for name, t in tensors.tensors().items():
        assert bit_identical(t, before[name]), f"{name} was written to"
    theirs = run(case, nn, tensors)
    if case.tracked:
        assert ours.pop("num_batches_tracked").item() == theirs.pop("num_batches_tracked").item()
    expected = expectations(case, tensors)
    assert ours.keys() == expected.keys()
    problems = []
    for name, (exact, scale) in expected.items():
        value, other = ours[name], theirs[name]
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        share = excess(case, value, exact, scale)
        mine, torchs = rms(value, exact, scale), rms(other, exact, scale)
        limit = 2 * torchs + 2 * torch.finfo(value.dtype).eps  # NaN (torch overflowed) limits nothing
        if not share <= 1 or mine > limit:
            problems.append(f"{name}: {share:.2f} of the allowed error, rms {mine:.1e} (torch {torchs:.1e})")
    assert not problems, "; ".join(problems)
    if case.storage in ("dense", "offset"):
        strides = tensors.x.stride()
        assert (ours["y"].stride(), ours["dx"].stride()) == (strides, strides), "x has another memory format"


def compile_for(cases: list[Case]) -> None:
    """Run steps whose results nobody looks at: it compiles their kernels. What fails is left to the tests."""
    for case in cases:
        with contextlib.suppress(Exception):
            run(case, bnfast, given(case))
