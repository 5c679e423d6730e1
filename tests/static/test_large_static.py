"""Tensors of more than 2^31 elements: the last program of each grid is executed, and stays within its
tensors. Memory that nothing touches costs nothing."""

from __future__ import annotations

import pytest

from bnfast.ptx.execute import Arguments, program_of, run
from codegen import launches
from codegen.cases import LAST, Case, layers

pytestmark = [pytest.mark.static, pytest.mark.usefixtures("executor")]

LARGE = [
    *layers("BatchNorm", (1, 64, 5793, 5800), after=["relu"], last=LAST),
    *layers("BatchNorm", (5, 3, 12000, 12000)),
    *layers("BatchNorm", (800_000, 56, 7, 7), after=["relu"]),
    *layers("GroupNorm", (2, 64, 4100, 4100), last=(True, False), groups=8),
    *layers("InstanceNorm", (2, 3, 20000, 20000)),
    *layers("LayerNorm", (40, 54_000_000)),
    *layers("LayerNorm", (2_200_000, 1024)),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_every_address_is_inside(case: Case) -> None:
    assert case.x_bytes > 2**31 * case.dtype.itemsize
    for each in (each for several in launches.of_case(case).values() for each in several):
        given = Arguments.of(each.code, each.arguments, watched=False)
        shared, program = each.code.metadata.shared, program_of(each.code)
        last = range(each.programs - 1, each.programs)
        assert run(program, each.kernel, each.programs, shared, given, 1, only=last).count("sectors")
