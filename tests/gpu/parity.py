"""What the GPU tests share: a case, its tensors, one step of a layer, and the judgement of what it returns
(bnfast.exact has the rule, truth.py the truth)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bnfast
from bnfast import exact
from bnfast.dispatch import INTERPRET
from tests.gpu import torchs, truth
from tests.support.buffers import bit_identical, nan_filled_allocations

SUFFIXES = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    layer: str = "BatchNorm"  # or InstanceNorm, BatchRenorm, GroupNorm
    groups: int = 0  # GroupNorm's
    # BatchRenorm's r_max, d_max, warmup_steps, r_max_steps, d_max_steps: at batch 3 r may be 1.5 and d 0.5
    schedule: tuple[float, float, int, int, int] = (3.0, 1.0, 2, 6, 4)
    batches: int = 3  # that a layer with running statistics has seen

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        words += ["nhwc"] * self.channels_last + ["train" if self.training else "eval"]
        words += [self.layer] * (self.layer != "BatchNorm")
        for key, usual in (USUAL | {"tracked": not self.in_sample}).items():
            value = getattr(self, key)
            if value != usual:
                words.append(f"{key}={value}".replace("torch.", ""))
        return "-".join(words)

    @property
    def batch(self) -> bool:
        """Whether the batch's own statistics are used."""
        return self.training or not self.tracked

    @property
    def in_sample(self) -> int:
        """How many sets of values have statistics of their own in a sample; 0 where a batch shares them."""
        return {"GroupNorm": self.groups, "InstanceNorm": self.shape[1]}.get(self.layer, 0)

    @property
    def factor(self) -> float:
        """What the running statistics move by."""
        if self.momentum is None:
            return 0.0 if self.layer == "InstanceNorm" else 1 / (self.batches + 1)
        return self.momentum


_DEFAULT = Case((1, 1))
USUAL = {
    key: getattr(_DEFAULT, key)
    for key in (
        "mean", "affine", "bias", "tracked", "parameters", "momentum", "eps", "storage", "gradient", "groups",
        "schedule",
    )
}  # fmt: skip

# torch's InstanceNorm tracks nothing unless it is told to, and its GroupNorm never does.
group_norm = partial(Case, layer="GroupNorm", tracked=False)
instance_norm = partial(Case, layer="InstanceNorm", tracked=False)
batch_renorm = partial(Case, layer="BatchRenorm")


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

    def rising(start: float, end: float, steps: int) -> Tensor:
        return torch.linspace(start, end, steps, device=device(), dtype=torch.float64)

    # Every set of values that share statistics has its own mean, and its own deviation in each sample, or a
    # kernel that mixes them up would go unseen. No weight is near 0.
    sets = case.in_sample or channels
    spread = rising(0.9, 1.1, sets).repeat_interleave(channels // sets)
    x = random(*case.shape)
    if case.in_sample:
        x *= rising(0.75, 1.25, len(x)).view(-1, *[1] * (x.dim() - 1))
    x = (x + case.mean * exact.by_channel(spread, x.dim())).to(case.dtype)
    dy = random(*case.shape).to(case.dtype)
    weight = random(channels)
    vectors = (
        weight + 0.5 * weight.sign(),
        random(channels),
        case.mean * spread + random(channels),
        random(channels).square() + 0.5,
    )
    parameters = case.parameters or exact.accumulator(case.dtype)
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
    module = _new(case, library)
    if case.affine:
        module.weight = nn.Parameter(tensors.weight)
        module.bias = None if tensors.bias is None else nn.Parameter(tensors.bias)
    if case.tracked:
        how = "offset" if case.storage == "offset" else "dense"
        module.running_mean = placed(tensors.running_mean.clone(), how)
        module.running_var = placed(tensors.running_var.clone(), how)
        module.num_batches_tracked.fill_(case.batches)
    return module.train(case.training)


def _new(case: Case, library: Any) -> nn.Module:
    channels, eps, affine = case.shape[1], case.eps, case.affine
    if case.layer == "GroupNorm":
        return library.GroupNorm(case.groups, channels, eps, affine, device=device())
    kind = getattr(library, case.layer + SUFFIXES[len(case.shape)])
    if case.layer != "BatchRenorm":
        return kind(channels, eps, case.momentum, affine, case.tracked, device=device())
    names = ("r_max", "d_max", "warmup_steps", "r_max_steps", "d_max_steps")
    schedule = dict(zip(names, case.schedule, strict=True))
    module = kind(channels, eps, affine=affine, device=device(), **schedule)
    module.momentum = case.momentum  # None is for later only
    return module


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


def excess(case: Case, value: Tensor, expected: exact.Value) -> float:
    return exact.excess(value, expected, exact.accumulator(case.dtype))


def expectations(case: Case, tensors: Given) -> dict[str, exact.Value]:
    """Everything that a step returns or writes, but for the batch counter."""
    true = truth.of(case, tensors)
    return {"y": true.y(tensors.x), "dx": true.dx(tensors.x, tensors.dy), **true.vectors}


def check(case: Case) -> None:
    """One step of bnfast's layer is right, looks as torch's does, and leaves its inputs alone."""
    tensors = given(case)
    before = {name: t.clone() for name, t in tensors.tensors().items()}
    with nan_filled_allocations():  # what a kernel forgets to write is NaN
        ours = run(case, bnfast, tensors)
    for name, t in tensors.tensors().items():
        assert bit_identical(t, before[name]), f"{name} was written to"
    theirs = run(case, torchs, tensors)
    if case.tracked:
        assert ours.pop("num_batches_tracked").item() == theirs.pop("num_batches_tracked").item()
    expected = expectations(case, tensors)
    assert ours.keys() == expected.keys()
    problems = []
    for name, true in expected.items():
        value, other = ours[name], theirs[name]
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        verdict = exact.judge(value, other, true, exact.accumulator(case.dtype))
        if not verdict.ok:
            problems.append(f"{name}: {verdict}")
    assert not problems, "; ".join(problems)
    if case.storage in ("dense", "offset"):
        strides = tensors.x.stride()
        assert (ours["y"].stride(), ours["dx"].stride()) == (strides, strides), "x has another memory format"


def compile_for(cases: list[Case]) -> None:
    """Run steps whose results nobody looks at: it compiles their kernels. What fails is left to the tests."""
    for case in cases:
        with contextlib.suppress(Exception):
            run(case, bnfast, given(case))
