"""ResNet-50 as benchmarks.model_step trains it: the network, and the variants of it.

Weights are bf16 without autocast, BatchNorm's parameters and statistics fp32, the loss is computed in fp32:
what people do who train in bf16 outright, since bf16 has too few bits for a running mean. (fp64, which a CPU
is given, stays fp64 throughout.) The layout is channels_last.

Convolutions start as He et al. 2015 (arXiv 1502.01852) have it, each block's last BatchNorm with weight 0
(Goyal et al. 2017, arXiv 1706.02677, section 5.1; torchvision's zero_init_residual). This is what makes
losses comparable: with that weight at 1, torch.nn and torch.nn with its batch in another order are 10 % apart
after 20 steps of a narrow ResNet-50 even in fp32, and nothing but a wreck would show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import bnfast
from benchmarks.baselines import pytorch
from benchmarks.resnet import Bottleneck, resnet50
from bnfast import dispatch
from codegen.cases import Case


@dataclass(frozen=True)
class Task:
    """What is trained: random images [batch, 3, image, image] of `classes` classes, on a ResNet-50 whose stem
    has `width` channels, with weights of `dtype`."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    classes: int = 1000
    image: int = 224

    def __str__(self) -> str:
        usual = Task(self.device)
        if (self.width, self.classes, self.image) == (usual.width, usual.classes, usual.image):
            return "ResNet-50"
        return f"ResNet-50 of width {self.width}, {self.classes} classes"


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of BatchNorm's parameters and of the loss."""
    return torch.promote_types(dtype, torch.float32)


def network(task: Task) -> nn.Module:
    """torch.nn's, on the CPU; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet50(classes=task.classes, width=task.width)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
    model.to(task.dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(wide(task.dtype))
    return model


def same(model: nn.Module) -> nn.Module:
    return model


def without_norms(model: nn.Module) -> nn.Module:
    """nn.Identity for each BatchNorm. Each block's last convolution starts smaller, since nothing else now
    keeps the sum of 16 blocks from growing: values are to be ordinary numbers, as power and so clocks depend
    on them."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
        if isinstance(module, Bottleneck):
            module.conv3.weight.data *= 0.25
    return model


@dataclass(frozen=True)
class Variant:
    """change: makes it of torch.nn's network, in place if it likes. compiled: the network by torch.compile;
    loss and optimizer stay as they are. norms: False where it has none left."""

    name: str
    change: Callable[[nn.Module], nn.Module] = same
    compiled: bool = False
    norms: bool = True

    def ran(self, task: Task, batch: int) -> str:
        """Who computes the normalization."""
        if not self.norms:
            return ""
        if self.change is same and self.compiled:
            return "Inductor"
        sizes = (batch, task.width, task.image // 2, task.image // 2)
        case = Case("", "", "BatchNorm", sizes, 0, task.dtype, channels_last=True)
        if self.change is same:
            return pytorch.backend(case, task.device)
        return "plain torch" if dispatch.reason_for_torch(case.empty(task.device)) else "bnfast's kernels"


TORCH = Variant("torch")
# The first of each is what the others' losses and times are held against. What torch.compile takes is apart,
# since that compiles for a minute a network and batch size, and what is quick must not wait for it.
PLAIN = (
    TORCH,
    Variant("fused", bnfast.fuse),
    Variant("converted", bnfast.convert),
    Variant("torch", without_norms, norms=False),
)
COMPILED = (
    TORCH,
    Variant("torch.compile", compiled=True),
    Variant("fused, torch.compile", bnfast.fuse, compiled=True),
    Variant("torch.compile", without_norms, compiled=True, norms=False),
)
