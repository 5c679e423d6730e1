"""A case: one layer and one input, and the tensors that it starts from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from bnfast import exact
from bnfast.reference.batchnorm import by_channel

# what a case's name shows in another form, or not at all
SHOWN_OTHERWISE = ("shape", "dtype", "channels_last", "training", "layer", "seed", "batches")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    layer: str = "BatchNorm"  # or BatchRenorm, GroupNorm, InstanceNorm, LayerNorm (of the last dimension)
    groups: int = 0  # GroupNorm's
    # BatchRenorm's r_max, d_max, warmup_steps, r_max_steps, d_max_steps: at batch 3 r may be 1.5 and d 0.5
    schedule: tuple[float, float, int, int, int] = (3.0, 1.0, 2, 6, 4)
    batches: int = 3  # number of batches that a layer with running statistics has seen before

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        words += ["nhwc"] * self.channels_last + ["train" if self.training else "eval"]
        words += [self.layer] * (self.layer != "BatchNorm")
        usual = {field.name: field.default for field in fields(self)} | {"tracked": not self.in_sample}
        for key, value in vars(self).items():
            if key not in SHOWN_OTHERWISE and value != usual[key]:
                words.append(f"{key}={value}".replace("torch.", ""))
        return "-".join(words)

    @property
    def batch(self) -> bool:
        """Whether the batch's own statistics are used."""
        return self.training or not self.tracked

    @property
    def channels(self) -> int:
        """The number of elements of weight and of bias."""
        return self.shape[-1 if self.layer == "LayerNorm" else 1]

    @property
    def in_sample(self) -> int:
        """The number of sets of channels in a sample that have statistics of their own; 0 where statistics
        span the batch."""
        return {"GroupNorm": self.groups, "InstanceNorm": self.channels}.get(self.layer, 0)

    @property
    def factor(self) -> float:
        """The weight of the batch in the running statistics."""
        if self.momentum is None:
            return 0.0 if self.layer == "InstanceNorm" else 1 / (self.batches + 1)
        return self.momentum


# torch's InstanceNorm has running statistics only on request, and its GroupNorm never.
group_norm = partial(Case, layer="GroupNorm", tracked=False)
instance_norm = partial(Case, layer="InstanceNorm", tracked=False)
batch_renorm = partial(Case, layer="BatchRenorm")
layer_norm = partial(Case, layer="LayerNorm", tracked=False)


def placed(t: Tensor, how: str, channels_last: bool = False) -> Tensor:
    """Returns the values of t in memory of another order.

    dense: in the layout's own order. offset: the same, one element past a 16-byte boundary. sliced: a view
    into something wider. transposed: N and C are exchanged. expanded: one value, stride 0 everywhere.
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


def given(case: Case, device: torch.device) -> Given:
    channels = case.channels
    generator = torch.Generator(device).manual_seed(case.seed + 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    def rising(start: float, end: float, steps: int) -> Tensor:
        return torch.linspace(start, end, steps, device=device, dtype=torch.float64)

    # Every set of values that share statistics has its own mean, and its own deviation in each sample.
    # Otherwise a kernel that confuses two sets would pass. No weight is near 0.
    sets = case.in_sample or channels
    spread = rising(0.9, 1.1, sets).repeat_interleave(channels // sets)
    x = random(*case.shape)
    by_sample = rising(0.75, 1.25, len(x)).view(-1, *[1] * (x.dim() - 1))
    if case.in_sample or case.layer == "LayerNorm":
        x *= by_sample
    means = by_sample if case.layer == "LayerNorm" else by_channel(spread, x)
    x = (x + case.mean * means).to(case.dtype)
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
