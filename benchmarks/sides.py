"""The two sides of a comparison: what bnfast and what torch.compile launch for a case, counted at its size,
and executed whole against fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import generated, inductor, model
from benchmarks.generated import Candidate
from bnfast.ptx.driver import launching
from bnfast.ptx.execute import Arguments, Grid, program_of, run
from codegen import SMS, launches, work
from codegen.cases import DIRECTIONS, Case
from codegen.work import Work

WHOLE = 8e6  # bytes of x: of larger ones, the largest batch that is smaller is executed
Call = dict[str, list[Work]]  # by direction


@dataclass(frozen=True)
class Problem:
    """given: the inputs of inductor.expression by name. wanted: what comes out, in fp64, by direction."""

    case: Case
    given: dict[str, Tensor]
    dy: Tensor
    wanted: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, case: Case) -> Problem:
        generator = torch.Generator().manual_seed(7)
        given = dict(zip(inductor.names(case), inductor.empty(case, "cpu"), strict=True))
        for name, t in given.items():
            low, wide = {"weight": (0.5, 1.0), "running_var": (0.5, 1.0)}.get(name, (-0.5, 1.0))
            t.data.uniform_(low, low + wide, generator=generator)
        given["x"].data.normal_(0.5, 1.5, generator=generator)
        dy = case.empty().normal_(generator=generator)
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in given.values()]
        y = inductor.expression(case)(*exact)
        sources = [t for t in exact if t.requires_grad]
        gradients = torch.autograd.grad(y, sources, dy.double())
        named = dict(zip(given, exact, strict=True))
        forward = {"y": y.detach()}
        forward |= {name: t for name, t in named.items() if name.startswith("running")}
        of = [name for name, t in given.items() if t.requires_grad]
        return cls(
            case,
            given,
            dy,
            dict(zip(DIRECTIONS, (forward, dict(zip(of, gradients, strict=True))), strict=True)),
        )

    def distances(self, forward: dict[str, Tensor], backward: dict[str, Tensor]) -> dict[str, float]:
        """By direction: that of the result that is furthest from fp64's."""
        found = dict(zip(DIRECTIONS, (forward, backward), strict=True))
        return {
            way: max(_apart(found[way][name], wanted) for name, wanted in self.wanted[way].items())
            for way in DIRECTIONS
        }


def _apart(found: Tensor, wanted: Tensor) -> float:
    """infinite where a value is not finite."""
    apart = float((found.detach().double() - wanted).norm() / wanted.norm())
    return apart if apart == apart else float("inf")


@dataclass(frozen=True)
class Side:
    """Who computes a case, what that launches, and how far its results are from fp64's, by direction; those
    were executed at a batch of `checked`."""

    name: str
    call: Call
    apart: dict[str, float]
    checked: int


def reduced(case: Case) -> Case:
    """With the largest batch that is executed whole."""
    n = max(1, min(case.shape[0], int(WHOLE * case.shape[0] / case.x_bytes)))
    if n < case.shape[0] and case.norm == "BatchNorm":
        n = max(2, n)
    return dataclasses.replace(case, shape=(n, *case.shape[1:]))


def execute(name: str, code: Any, grid: Grid, given: dict[str, Any]) -> None:
    """All programs of a launch. Nothing is judged but what comes out."""
    arguments = Arguments.of(code, given, watched=False)
    shared = code.metadata.shared
    run(program_of(code), name, grid, shared, arguments, 1, counting=False, racing=True)


# bnfast


def layer_of(case: Case) -> nn.Module:
    """With parameters as torch.nn's layer has to have them on a GPU."""
    layer = launches.layer_of(case)
    for name, parameter in layer.named_parameters():
        if name in ("weight", "bias"):
            parameter.data = parameter.data.to(inductor.parameter_dtype(case))
    return layer


def ours(case: Case) -> Side:
    small = reduced(case)
    return Side("bnfast", our_call(case), _our_distances(Problem.of(small)), small.shape[0])


def our_call(case: Case) -> Call:
    layer = layer_of(case)
    given = [case.empty().requires_grad_() for _ in range(1 + case.residual)]
    with launches.recording() as found:
        y = layer(*given)
        forward = len(found)
        torch.autograd.grad(y, [*given, *layer.parameters()], torch.empty_like(y))
    done = [work.of_launched(each) for each in found]
    return dict(zip(DIRECTIONS, (done[:forward], done[forward:]), strict=True))


def _our_distances(problem: Problem) -> dict[str, float]:
    def executed(kernel: str, programs: int, given: dict[str, Any], compiled: Callable[[], Any]) -> None:
        execute(kernel, compiled(), (programs, 1, 1), given)

    layer, inputs = layer_of(problem.case), problem.given
    layer.load_state_dict({k: v.detach() for k, v in inputs.items() if k not in ("x", "z")}, strict=False)
    handed = [inputs[name].detach().requires_grad_() for name in ("x", "z") if name in inputs]
    with launching(executed, SMS):
        y = layer(*handed)
        gradients = torch.autograd.grad(y, [*handed, *layer.parameters()], problem.dy)
    of = [name for name in ("x", "z") if name in inputs] + ["weight", "bias"]
    running = {k: v for k, v in layer.named_buffers() if k.startswith("running")}
    return problem.distances({"y": y, **running}, dict(zip(of, gradients, strict=True)))


# torch.compile


def of_inductor(case: Case, sources: Sequence[str], of_reduced: Sequence[str]) -> Side:
    """sources: of the case, to count; of the reduced one, to execute."""
    small = reduced(case)
    return Side("inductor", counted(case, sources), _distances(Problem.of(small), of_reduced), small.shape[0])


def best(candidates: Sequence[Candidate]) -> tuple[int, Work]:
    """The configuration that the model likes best, in place of Inductor's own timing; none that spills, if
    others do not."""
    found = []
    for each in candidates:
        work.untouched(each.given)
        found.append(work.of_kernel(each.kernel, each.code, each.grid, each.given))
    return min(enumerate(found), key=lambda pair: (pair[1].spills > 0, model.of_work(pair[1]).all))


def counted(case: Case, sources: Sequence[str]) -> Call:
    call: Call = {direction: [] for direction in DIRECTIONS}
    kept = []  # so that no tensor has the address of an earlier one

    def count(direction: str) -> Callable[[list[Candidate]], None]:
        def choose(candidates: list[Candidate]) -> None:
            kept.append(candidates)
            call[direction].append(best(candidates)[1])

        return choose

    forward, backward = map(count, DIRECTIONS)
    given = [t.detach() for t in inductor.empty(case, "cpu")]
    y, *saved = generated.call(sources[0], given, forward)
    generated.call(sources[1], [*saved, torch.empty_like(y)], backward)
    return call


def _distances(problem: Problem, sources: Sequence[str]) -> dict[str, float]:
    def choose(candidates: list[Candidate]) -> None:
        first = candidates[0]
        execute(first.kernel, first.code, first.grid, first.given)

    given = {name: t.detach().clone() for name, t in problem.given.items()}
    y, *saved = generated.call(sources[0], [*given.values()], choose)
    dy = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype).copy_(problem.dy)
    gradients = generated.call(sources[1], [*saved, dy], choose)
    running = {name: t for name, t in given.items() if name.startswith("running")}
    of = dict(zip(given, gradients, strict=True))
    return problem.distances({"y": y, **running}, {k: v for k, v in of.items() if v is not None})
