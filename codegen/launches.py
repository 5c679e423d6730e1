"""What a layer launches: its host code runs as it is, up to the launch, which is noted and not made.

Tensors have the sizes of the case, and nothing touches their memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import bnfast
from bnfast.kernels import launch
from bnfast.ptx.driver import launching
from bnfast.ptx.program import LANES
from codegen import SMS, counts, sass
from codegen.cases import Case

# The tensors whose bytes count. Parameters, running statistics and counters are few.
DATA = {"x_ptr", "y_ptr", "residual_ptr", "relu_mask_ptr", "dy_ptr", "dx_ptr", "dresidual_ptr"}
HANDED = {"partials_ptr", "shares_ptr", "sums_ptr"}
# These count if they have two values a group or row; BatchNorm's have a few a channel.
TABLES = {"stats_ptr", "dx_coeffs_ptr"}
# How often a launch moves one of them, where that is not once.
TIMES = {
    ("statistics_kernel", "partials_ptr"): 2,  # out, and back to the last program
    ("gradient_sums_kernel", "partials_ptr"): 2,
    ("long_row_norm_kernel", "x_ptr"): 2,
    # counted once, for the launch beside them that reads it as well
    ("gradient_transform_kernel", "stats_ptr"): 0,
    ("row_activation_kernel", "stats_ptr"): 0,
    ("wide_gradients_kernel", "stats_ptr"): 0,
}


@dataclass(frozen=True)
class Launched:
    """One launch. programs: its grid. arguments: by name; tensors, None, numbers and compile-time constants.
    code: Triton's compiled kernel, None in the interpreter."""

    kernel: str
    programs: int
    arguments: dict[str, Any]
    code: Any = None

    @property
    def bytes(self) -> int:
        """What it reads and writes, counted as plans do (plan.StepPlan)."""
        return self._merged() + sum(
            t.nbytes * TIMES.get((self.kernel, name), 1)
            for name, t in self.arguments.items()
            if isinstance(t, Tensor) and (name in DATA | HANDED or (name in TABLES and len(t) == 2))
        )

    def _merged(self) -> int:
        """What the last program of a sample leaves of each channel, and reads again to merge the groups."""
        group = self.arguments.get("group_size", 1)
        if group == 1 or "partials_ptr" not in self.arguments:
            return 0
        values = 3 if self.kernel == "statistics_kernel" else 2
        wide = self.arguments["partials_ptr"].itemsize
        return 2 * values * wide * group * int(self.arguments["groups"])

    @property
    def streams(self) -> bool:
        """Whether it goes through x or dy, rather than add up what others have left."""
        return not self.arguments.keys().isdisjoint({"x_ptr", "dy_ptr"})

    @property
    def report(self) -> sass.Report:
        return sass.report(self.code)

    @cached_property
    def counts(self) -> counts.Counts:
        """Of a program. Its tensors' values do not count, and change."""
        return counts.counted(self.kernel, self.code, self.programs, self.arguments)

    @property
    def instructions(self) -> float:
        """Of a thread, for 16 bytes that the launch has to move."""
        return self.counts.instructions * self.programs * LANES * 16 / self.bytes

    @property
    def in_flight(self) -> float:
        """Bytes that an SM waits for at a time."""
        return sass.bytes_in_flight_per_sm(self.report, self.programs / SMS)


@contextlib.contextmanager
def recording(target: str = "sm_90") -> Iterator[list[Launched]]:
    """Within, what layers launch for CPU tensors is planned for SMS multiprocessors and added to the list."""
    found: list[Launched] = []

    def note(kernel: str, programs: int, arguments: dict[str, Any], compiled: Callable[[], Any]) -> None:
        found.append(Launched(kernel, programs, arguments, None if launch.INTERPRET else compiled()))

    with launching(note, SMS, target):
        yield found


def layer_of(case: Case) -> nn.Module:
    """bnfast's layer, in the case's mode. LayerNorm is over the last dimension."""
    channels = case.shape[1]
    after: dict[str, Any] = {"dtype": case.parameter_dtype, "activation": case.activation}
    if case.norm == "GroupNorm":
        return bnfast.GroupNorm(case.groups, channels, **after)
    if case.norm == "LayerNorm":
        return bnfast.LayerNorm(case.shape[-1], **after)
    dims = max(1, len(case.shape) - 2)
    layer: nn.Module = getattr(bnfast, f"{case.norm}{dims}d")(channels, affine=True, **after)
    return layer.train(case.training)


def of_case(case: Case, target: str = "sm_90") -> dict[str, list[Launched]]:
    """The launches of one call, forward and backward, with the gradients of all that there is."""
    layer = layer_of(case)
    given = [case.empty().requires_grad_() for _ in range(1 + case.residual)]
    with recording(target) as found:
        y = layer(*given)
        forward = len(found)
        torch.autograd.grad(y, [*given, *layer.parameters()], torch.empty_like(y))
    return {"forward": found[:forward], "backward": found[forward:]}
