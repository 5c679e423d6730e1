"""All lanes of a warp that hold the same sum hold the same bits of it.

Lanes add up by turns: each adds its partner's value to its own (SHFL.BFLY, then FADD). Where its own value is
a product and the compiler has contracted the two (FFMA of the product's factors and the partner's product),
either lane of the pair rounds the other's product and not its own, and which of them stores the sum decides
its last bit. That is read off machine code, since the assembler contracts as well."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch

from codegen import launches, sass
from codegen.cases import CASES, FP32, LAST, Case, layers
from codegen.sass_flow import Code, Instruction
from tests.support import toys

pytestmark = pytest.mark.static

REGISTER = re.compile(r"R(\d+)")


# few elements a thread, so that it adds up none, or few, of its own before those of others
SMALL = (
    *layers("BatchNorm", (2, 7, 5, 5)),
    *layers("BatchNorm", (2, 4, 2, 2), dtypes=[FP32]),
    *layers("GroupNorm", (2, 30, 9, 9), groups=5, dtypes=[FP32]),
    *layers("GroupNorm", (2, 30, 9, 9), last=LAST, groups=5),
    *layers("GroupNorm", (4, 12, 5, 5), after=["relu"], groups=3, dtypes=[torch.float64]),
    *layers("InstanceNorm", (2, 8, 3, 3), dtypes=[FP32]),
    *layers("LayerNorm", (1, 16), dtypes=[FP32]),
)


def written(instruction: Instruction) -> set[int]:
    """The registers that an instruction other than a store writes."""
    first = REGISTER.match(instruction.operands)
    if first is None:
        return set()
    two = instruction.name[0] == "D" or instruction.opcode.endswith((".64", ".WIDE", ".F64.F32"))
    count = 4 if ".128" in instruction.opcode else 2 if two else 1
    return set(range(int(first[1]), int(first[1]) + count))


def contracted(code: Code) -> Iterator[str]:
    """Operations on a product and what another lane has just handed over."""
    handed: set[int] = set()
    for number in sorted(code.flow):
        if list(code.flow.pred[number]) != [number - 1]:  # what was handed over is not known
            handed.clear()
        ins = code.instructions[number]
        operands = ins.operands.split(", ")
        if ins.name == "SHFL":  # writes its second operand, the first is a predicate
            to = int(operands[1][1:])
            (handed.add if ".BFLY" in ins.opcode else handed.discard)(to)
            continue
        if ins.name in ("FFMA", "DFMA"):
            added = REGISTER.search(operands[3])
            if added is not None and int(added[1]) in handed:
                yield str(ins)
        if ins.name not in ("ST", "STG", "STS"):
            handed -= written(ins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounded", [False, True], ids=["contracted", "rounded"])
def test_what_is_looked_for(rounded: bool, dtype: torch.dtype) -> None:
    """Kernels that add up products of lanes, as they come and rounded first."""
    x = torch.empty(32, dtype=dtype)
    code = sass.compile_kernel(toys.dot, x, x, x, BLOCK=32, ROUNDED=rounded, num_warps=1).code
    assert any(ins.opcode == "SHFL.BFLY" for ins in code.instructions)
    assert bool(list(contracted(code))) is not rounded


@pytest.mark.parametrize("case", [*SMALL, *CASES], ids=str)
def test_lanes_agree(case: Case) -> None:
    for each in itertools.chain(*launches.of_case(case).values()):
        assert not list(contracted(each.report.code)), each.kernel
