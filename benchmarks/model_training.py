"""A training step of a variant of ResNet-50, and that step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import graphs
from benchmarks.model_variants import Task, Variant, network, wide

LEARNING_RATE, MOMENTUM = 0.01, 0.9
WARM_UP = 3  # steps: the first compiles and tries algorithms, the second has momentum to add to
Run = Callable[[], Tensor]  # one step, its loss


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
        if self._x.device.type != "cuda":
            self._steps(WARM_UP)
            return
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._steps(WARM_UP)
        current.wait_stream(side)
        torch.cuda.empty_cache()  # the memory cached for that stream is of no use to others

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self()


def captured(step: Step, pool: Any) -> Run:
    """The whole step, warmed up before, as a CUDA graph; call what is returned to replay it.

    pool: torch.cuda.graph_pool_handle(), memory that graphs share, since several steps' activations would
    not fit beside one another. That is sound as long as they never run at once, and what one leaves (its
    loss) is read before another runs. None: RuntimeError, there is no CUDA."""
    if pool is None:
        raise RuntimeError("a CUDA graph needs CUDA")
    graph, loss = graphs.captured(step, pool)

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay
