"""ResNet-50 (He et al. 2015, arXiv 1512.03385), with the stride in the 3x3 convolution as most train it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

Activation = Callable[[], nn.Module]


class Bottleneck(nn.Module):
    """act(x + 1x1, 3x3, 1x1 convolutions of x), each with a BatchNorm; the first changes x's size too."""

    def __init__(self, channels: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.act = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

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
    parts["stem"] = nn.Sequential(
        nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), activation(),
        nn.MaxPool2d(3, 2, padding=1),
    )  # fmt: skip
    channels = width
    for i, blocks in enumerate((3, 4, 6, 3)):
        inner, layer = width << i, nn.Sequential()
        for j in range(blocks):
            layer.append(Bottleneck(channels, inner, 2 if i > 0 and j == 0 else 1, activation))
            channels = 4 * inner
        parts[f"layer{i + 1}"] = layer
    parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(parts)
