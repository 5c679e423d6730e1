"""ResNet-50 (He et al. 2015, arXiv 1512.03385), with the stride in the 3x3 convolution as most train it; its
variants, one training step, and how far their losses lie apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfast
from benchmarks import timing
from benchmarks.baselines import backend
from bnfast import dispatch
from codegen.cases import Case

LEARNING_RATE, MOMENTUM = 0.01, 0.9
WARM_UP = 3  # steps: the first compiles and tries algorithms, the second has momentum to add to
Activation = Callable[[], nn.Module]
FACTOR = 3.0
Run = Callable[[], Tensor]  # one training step, its loss


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
            convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out))

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


# what is trained


@dataclass(frozen=True)
class Task:
    """Random images [batch, 3, image, image] of `classes` classes, on a ResNet-50 whose stem has `width`
    channels, with weights of `dtype`."""

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
    """torch.nn's, on the CPU; the same weights each time.

    Weights are bf16 without autocast, BatchNorm's parameters and statistics fp32: what people do who train in
    bf16 outright, since bf16 has too few bits for a running mean. (fp64, which a CPU is given, stays fp64.)
    Convolutions start as He et al. 2015 (arXiv 1502.01852) have it, each block's last BatchNorm with weight 0
    (Goyal et al. 2017, arXiv 1706.02677, section 5.1; torchvision's zero_init_residual). This is what makes
    losses comparable: with that weight at 1, torch.nn and torch.nn with its batch in another order are 10 %
    apart after 20 steps of a narrow ResNet-50 even in fp32, and nothing but a wreck would show."""
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
        case = Case("BatchNorm", sizes, 0, task.dtype, channels_last=True)
        if self.change is same:
            return backend(case, task.device)
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


# a training step


def batch_of(task: Task, size: int) -> tuple[Tensor, Tensor]:
    """Normal random images [size, 3, image, image], channels_last, and random labels [size]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, task.image, task.image, generator=generator)
    labels = torch.randint(task.classes, (size,), generator=generator)
    x = x.to(task.device, task.dtype, memory_format=torch.channels_last)
    return x, labels.to(task.device)


class Step:
    """One training step: SGD with momentum, fused, on a batch that stays where it is, as a CUDA graph wants.

    Called: trains one step, and returns the loss before it, a scalar on the device."""

    def __init__(self, variant: Variant, task: Task, x: Tensor, labels: Tensor) -> None:
        model = variant.change(network(task))
        self._start = {name: t.clone() for name, t in model.state_dict().items()}  # on the CPU
        model.to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model.train()
        # dynamic=False, or the second batch size would be compiled for all sizes
        self._network = torch.compile(self.model, dynamic=False) if variant.compiled else self.model
        self._optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, fused=True)
        self._x, self._labels = x, labels

    def __call__(self) -> Tensor:
        self.drop_gradients()
        y = self._network(self._x)
        loss = F.cross_entropy(y.to(wide(y.dtype)), self._labels)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _momenta(self) -> list[Tensor]:
        return [state["momentum_buffer"] for state in self._optimizer.state.values()]

    def reset(self) -> None:
        """Everything as before the first step, in the same memory."""
        self.model.load_state_dict(self._start)
        for momentum in self._momenta():
            momentum.zero_()

    def nbytes(self) -> int:
        """Of parameters, buffers and momenta."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *self._momenta()))

    def warm_up(self) -> None:
        """On a stream of its own, as a capture wants it."""
        several = timing.repeated(self, WARM_UP)
        if timing.is_gpu(self._x.device):
            timing.on_a_side_stream(several)
            torch.cuda.empty_cache()  # the memory cached for that stream is of no use to others
        else:
            several()


def captured(step: Step, pool: Any) -> Run:
    """The whole step, warmed up before, as a CUDA graph; call what is returned to replay it.

    pool: torch.cuda.graph_pool_handle(), memory that graphs share, since several steps' activations would
    not fit beside one another. That is sound as long as they never run at once, and what one leaves (its
    loss) is read before another runs. None: RuntimeError, there is no CUDA."""
    if pool is None:
        raise RuntimeError("a CUDA graph needs CUDA")
    graph, loss = timing.captured(step, pool)

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


# losses


def curve(step: Step, run: Run, steps: int) -> Tensor:
    """The losses of the first steps, [steps], in their dtype, on the CPU. run: the step, or a graph of it."""
    step.reset()
    return torch.stack([run().clone() for _ in range(steps)]).cpu()


def apart(losses: Tensor, reference: Tensor) -> float:
    """The largest relative difference; NaN if there is any."""
    theirs = reference.double()
    return float(((losses.double() - theirs) / theirs).abs().max())


def allowed(step: Step, x: Tensor, labels: Tensor, reference: Tensor, orders: int) -> float:
    """What `apart` may be.

    Correct variants differ, since each sums in an order of its own and what is fused rounds once where
    torch.nn rounds twice; training magnifies it, by how much nobody can tell beforehand. So torch.nn is held
    against itself: its batch in another order is the same problem, with the same loss and the same gradients
    but for rounding. The largest difference that a few such orders make, times a factor since they are few,
    is what a variant may differ by. Seen on a CPU with ResNet-50 of width 8 in bf16: an order was never
    beyond three times the largest of three others; norm, add and ReLU rounded once were 0.6 to 1.6 times
    that, and a gradient of BatchNorm's weights that is 20 % too large 6 to 20 times. Smaller faults are for
    the tests of the layers: this shows that nothing is wired wrongly.

    step: trains torch.nn's network on x and labels, and had the losses `reference`.
    Both tensors are reordered in place, and put back. NaN if there is any, which `max` may pass over."""
    given = x.clone(), labels.clone()
    generator = torch.Generator().manual_seed(0)
    seen = [torch.finfo(reference.dtype).eps]
    try:
        for _ in range(orders):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            x.copy_(given[0][order])
            labels.copy_(given[1][order])
            seen.append(apart(curve(step, step, len(reference)), reference))
    finally:
        x.copy_(given[0])
        labels.copy_(given[1])
    return FACTOR * float(torch.tensor(seen, dtype=torch.float64).max())
