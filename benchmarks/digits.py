"""A small residual network on scikit-learn's bundled digits: real data, a real training loop, seconds of CPU.

The network is built around a normalization layer given from outside, so that torch.nn's and ours can be
trained alike: same seed, same batches, same everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Recipe:
    """One training run, in full."""

    epochs: int = 6
    batch: int = 64
    width: int = 16
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    dtype: torch.dtype = torch.float32
    steps: int | None = None  # stop after so many, whatever the epochs


@dataclass(frozen=True)
class Digits:
    """8x8 grey images of handwritten digits, 0 to 9; a fifth is held back for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """What a training run left behind."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    parameters: dict[str, Tensor] = field(default_factory=dict)  # at the end, as the next two
    buffers: dict[str, Tensor] = field(default_factory=dict)
    accuracy: float = float("nan")


class Block(nn.Module):
    """Two 3x3 convolutions and a way round them, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    """A stem, three residual blocks (8x8, 8x8 to 4x4, 4x4 to 2x2), average pooling and ten outputs."""

    def __init__(self, norm: Norm, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), norm(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, width, 1, norm),
            Block(width, 2 * width, 2, norm),
            Block(2 * width, 4 * width, 2, norm),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def load(seed: int, device: torch.device) -> Digits:
    from sklearn.datasets import load_digits  # a part of the job can do without scikit-learn

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels, held = images[order].to(device), labels[order].to(device), len(images) // 5
    return Digits(images[held:], labels[held:], images[:held], labels[:held])


@contextmanager
def repeatable() -> Iterator[None]:
    """Convolutions in full fp32 and the same every time, so that only the normalization may differ.

    One thread on the CPU: two gain nothing with tensors this small, and lose much where a core is busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)


def build(norm: Norm, recipe: Recipe, device: torch.device) -> Network:
    torch.manual_seed(recipe.seed)
    return Network(norm, recipe.width).to(device, recipe.dtype)


def batches(count: int, recipe: Recipe) -> list[Tensor]:
    """The rows of every batch of a run, shuffled anew each epoch; a last short batch is left out."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    rows: list[Tensor] = []
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        rows += list(order[: count - count % recipe.batch].split(recipe.batch))
    return rows[: recipe.steps]


def train(norm: Norm, digits: Digits, recipe: Recipe, tick: Callable[[float], object]) -> Run:
    """Trains from scratch; `tick` is told the loss after every step."""
    device, images = digits.train_images.device, digits.train_images.to(recipe.dtype)
    network, run = build(norm, recipe, device), Run()
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )
    with repeatable():
        for rows in batches(len(images), recipe):
            rows = rows.to(device)
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(network(images[rows]), digits.train_labels[rows])
            loss.backward()
            if not run.losses:
                run.gradients = {
                    name: p.grad.cpu().clone() for name, p in network.named_parameters() if p.grad is not None
                }
            optimizer.step()
            run.losses.append(loss.item())
            tick(run.losses[-1])
        run.accuracy = accuracy(network, digits)
    run.parameters = {name: value.detach().cpu() for name, value in network.named_parameters()}
    run.buffers = {name: value.detach().cpu() for name, value in network.named_buffers()}
    return run


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """The share of held-back images that a network gets right, in eval mode: with the running statistics."""
    network.eval()
    answers = network(digits.test_images.to(next(network.parameters()).dtype)).argmax(1)
    return float((answers == digits.test_labels).double().mean())
