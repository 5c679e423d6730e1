"""What torch's functions refuse ours refuse in the same words; what they allow gives the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import bnfast
from bnfast import functional
from bnfast.functional import instance_norm
from tests.support.alike import same_error
from tests.support.buffers import bit_identical
from tests.support.layers import CLOSE, data, every_path

X, M, V = data(3, 4, 5, 6), data(4, seed=3), data(4, seed=4).square() + 0.1
Call = Callable[[Any], Tensor]
# by function: calls of bnfast.functional or torch.nn.functional
GROUP_ERRORS: dict[str, Call] = {
    "C % G": lambda f: f.group_norm(X, 3),
    "G 0": lambda f: f.group_norm(X, 0),
    "G -2": lambda f: f.group_norm(X, -2),
    "G float": lambda f: f.group_norm(X, 2.0),
    "G bool": lambda f: f.group_norm(X, True),
    "1-D": lambda f: f.group_norm(data(4), 2),
    "one value a group": lambda f: f.group_norm(data(1, 4), 4),
    "one position": lambda f: f.group_norm(data(1, 2, 1, 1), 2),
    "weight size": lambda f: f.group_norm(X, 2, data(5)),
    "weight shape": lambda f: f.group_norm(X, 2, data(4, 1)),
    "bias size": lambda f: f.group_norm(X, 2, data(4), data(7)),
    "another device": lambda f: f.group_norm(X, 2, data(4).to("meta")),
    "integers": lambda f: f.group_norm(X.int(), 2),
    "eps str": lambda f: f.group_norm(X, 2, eps="small"),
    "eps None": lambda f: f.group_norm(X, 2, eps=None),
    "a list": lambda f: f.group_norm([1.0, 2.0], 2),
    "weight a list": lambda f: f.group_norm(X, 2, [1.0] * 4),
}
GROUP_ALLOWED: dict[str, Call] = {
    "eps < 0": lambda f: f.group_norm(data(2, 4, 9, 9) * 3, 2, eps=-0.5),
    "eps 0": lambda f: f.group_norm(X, 2, eps=0),
    "eps a tensor": lambda f: f.group_norm(X, 2, eps=torch.tensor(0.1)),
    "one value a group, two samples": lambda f: f.group_norm(data(2, 4), 4),
    "no samples": lambda f: f.group_norm(data(0, 4, 3), 2),
    "6-D": lambda f: f.group_norm(data(2, 4, 1, 2, 1, 2), 2),
    "2-D": lambda f: f.group_norm(data(5, 6), 3),
    "strided weight": lambda f: f.group_norm(X, 2, data(8)[::2]),
}
INSTANCE_ERRORS: dict[str, Call] = {
    "one position": lambda f: f.instance_norm(data(2, 4, 1)),
    "2-D": lambda f: f.instance_norm(data(3, 4)),
    "1-D": lambda f: f.instance_norm(data(3)),
    "no statistics": lambda f: f.instance_norm(X, use_input_stats=False),
    "one statistic": lambda f: f.instance_norm(X, M.clone()),
    "one statistic, not used": lambda f: f.instance_norm(X, M.clone(), use_input_stats=False),
    "weight size": lambda f: f.instance_norm(X, weight=data(3)),
    "weight shape": lambda f: f.instance_norm(X, weight=data(4, 1)),
    "statistics' size": lambda f: f.instance_norm(X, data(3), data(3)),
    "statistics' size, used": lambda f: f.instance_norm(X, data(3), data(3), use_input_stats=False),
    "momentum None": lambda f: f.instance_norm(X, M.clone(), V.clone(), momentum=None),
    "use_input_stats 1": lambda f: f.instance_norm(X, use_input_stats=1),
    "eps None": lambda f: f.instance_norm(X, eps=None),
    "statistics with a gradient": lambda f: f.instance_norm(X, M.clone().requires_grad_(), V.clone()),
    "a list": lambda f: f.instance_norm([1.0]),
}
INSTANCE_ALLOWED: dict[str, Call] = {
    "eps 0": lambda f: f.instance_norm(X, eps=0),
    "eps < 0": lambda f: f.instance_norm(X, eps=-0.01),
    "eps < 0, statistics": lambda f: f.instance_norm(X, M, V + 1, use_input_stats=False, eps=-0.01),
    "momentum 1": lambda f: f.instance_norm(X, M.clone(), V.clone(), momentum=1),
    "no samples": lambda f: f.instance_norm(data(0, 4, 3)),
    "no positions": lambda f: f.instance_norm(data(2, 4, 0)),
    "2-D, statistics": lambda f: f.instance_norm(data(3, 4), M, V, use_input_stats=False),
    "one position, statistics": lambda f: f.instance_norm(data(3, 4, 1), M, V, M, V, use_input_stats=False),
}
LAYER_ERRORS: dict[str, Call] = {
    "no shape": lambda f: f.layer_norm(data(2, 4), ()),
    "an int": lambda f: f.layer_norm(data(2, 4), 4),
    "a float": lambda f: f.layer_norm(data(2, 4), (4.0,)),
    "another shape": lambda f: f.layer_norm(data(2, 4), (5,)),
    "more dimensions": lambda f: f.layer_norm(data(4), (2, 4)),
    "weight too long": lambda f: f.layer_norm(data(2, 4), (4,), data(5)),
    "bias too long": lambda f: f.layer_norm(data(2, 4), (4,), None, data(5)),
    "weight of one dimension": lambda f: f.layer_norm(data(2, 2, 4), (2, 4), data(8)),
    "weight elsewhere": lambda f: f.layer_norm(data(2, 4), (4,), data(4).to("meta")),
    "integers": lambda f: f.layer_norm(data(2, 4).long(), (4,)),
    "complex": lambda f: f.layer_norm(data(2, 4).to(torch.complex64), (4,)),
    "eps a string": lambda f: f.layer_norm(data(2, 4), (4,), None, None, "small"),
}
# torch takes a negative eps, and lets the root of a negative number be NaN
LAYER_ALLOWED: dict[str, Call] = {
    f"eps {eps}": lambda f, eps=eps: f.layer_norm(data(3, 6), (6,), eps=eps)  # type: ignore[misc]
    for eps in (0.0, -1e-3, -10.0, 1, torch.tensor(1e-3))
}


def of_all(**tables: dict[str, Call]) -> pytest.MarkDecorator:
    calls = {f"{norm}, {name}": call for norm, table in tables.items() for name, call in table.items()}
    return pytest.mark.parametrize("call", calls.values(), ids=calls.keys())


@every_path
@of_all(group=GROUP_ERRORS, instance=INSTANCE_ERRORS, layer=LAYER_ERRORS)
def test_the_same_errors(call: Call, path: str) -> None:
    same_error(lambda: call(functional), lambda: call(F))


@every_path
@of_all(group=GROUP_ALLOWED, instance=INSTANCE_ALLOWED, layer=LAYER_ALLOWED)
def test_the_same_results(call: Call, path: str) -> None:
    assert_close(call(functional), call(F), equal_nan=True, **CLOSE)


@every_path
def test_a_batch_that_instance_norm_rejects_leaves_no_trace(path: str) -> None:
    mean, variance = M.clone(), V.clone()
    for x, weight in ((data(2, 4, 1), None), (X, data(3)), (X, data(4).to("meta"))):
        with pytest.raises((ValueError, RuntimeError)):
            instance_norm(x, mean, variance, weight)
        assert bit_identical(mean, M)
        assert bit_identical(variance, V)


@pytest.mark.parametrize("input", [None, [1.0, 2.0]], ids=str)
def test_input_that_is_no_tensor(input: Any) -> None:
    with pytest.raises(TypeError, match="must be Tensor"):
        bnfast.LayerNorm(2)(input)
