"""ResNet-50 (He et al. 2015, arXiv 1512.03385), with the stride in the 3x3 convolution as most train it, and
the variants of it whose training is compared (step.py)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnfast

Activation = Callable[[], nn.Module]
Norm = Callable[[int], nn.Module]  # of so many channels


class Bottleneck(nn.Module):
    """act(x + 1x1, 3x3, 1x1 convolutions of x), each with a norm; the first changes x's size too."""

    def __init__(
        self, channels: int, width: int, stride: int, activation: Activation, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), norm(out)
        self.act = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.act(y)


def resnet50(
    activation: Activation = lambda: nn.ReLU(inplace=True), classes: int = 1000, width: int = 64
) -> nn.Sequential:
    """Children: stem, layer1 to layer4, head. Input: [N, 3, H, W]. width: channels of the stem."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    first = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
    parts["stem"] = nn.Sequential(first, nn.BatchNorm2d(width), activation(), nn.MaxPool2d(3, 2, padding=1))
    channels = width
    for i, blocks in enumerate((3, 4, 6, 3)):
        inner, layer = width << i, nn.Sequential()
        for j in range(blocks):
            layer.append(Bottleneck(channels, inner, 2 if i > 0 and j == 0 else 1, activation))
            channels = 4 * inner
        parts[f"layer{i + 1}"] = layer
    parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(parts)


@dataclass(frozen=True)
class Task:
    """Random images [batch, 3, image, image] of `classes` classes, on a ResNet-50 whose stem has `width`
    channels, with weights of `dtype`."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    classes: int = 1000
    image: int = 224

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Normal random images [size, 3, image, image], channels_last, and random labels [size]."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, 3, self.image, self.image, generator=generator)
        labels = torch.randint(self.classes, (size,), generator=generator)
        x = x.to(self.device, self.dtype, memory_format=torch.channels_last)
        return x, labels.to(self.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of BatchNorm's parameters and of the loss."""
    return torch.promote_types(dtype, torch.float32)


def network(task: Task) -> nn.Module:
    """torch.nn's, on the CPU; the same weights each time.

    Weights are bf16 without autocast, BatchNorm's parameters and statistics fp32: what people do who train in
    bf16 outright, since bf16 has too few bits for a running mean.
    Convolutions start as He et al. 2015 (arXiv 1502.01852) have it, each block's last BatchNorm with weight 0
    (Goyal et al. 2017, arXiv 1706.02677, section 5.1; torchvision's zero_init_residual). This is what makes
    losses comparable: with that weight at 1, torch.nn and torch.nn with its batch in another order are 10 %
    apart after 20 steps of a narrow ResNet-50 even in fp32, and only gross errors would show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet50(classes=task.classes, width=task.width)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.get_parameter("weight"))
    model.to(task.dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(wide(task.dtype))
    return model


@dataclass(frozen=True)
class Variant:
    """change: makes it of torch.nn's network, in place if it likes. compiled: the network by torch.compile;
    loss and optimizer stay as they are."""

    name: str
    change: Callable[[nn.Module], nn.Module] = lambda model: model
    compiled: bool = False


TORCH = Variant("torch")
# The variants of a stage take turns, and are compared with the first of it. What torch.compile takes is a
# stage of its own: it compiles for a minute a network and batch size, and what is quick must not wait for it.
PLAIN = (TORCH, Variant("fused", bnfast.fuse), Variant("converted", bnfast.convert))
COMPILED = (
    TORCH,
    Variant("torch.compile", compiled=True),
    Variant("fused, torch.compile", bnfast.fuse, compiled=True),
)
