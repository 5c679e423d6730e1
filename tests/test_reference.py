"""The formulas in plain torch that GroupNorm and LayerNorm are differentiated by, and the judgement that the
tests go by, beside torch's own in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bnfast import exact
from bnfast.checks.cases import given, group_norm
from bnfast.reference import groupnorm, layernorm
from tests.support.layers import data


def test_group_norm() -> None:
    """The formulas, and the judgement, beside torch's in fp64."""
    g = given(group_norm((3, 6, 4, 5), torch.float64, True, groups=3), torch.device("cpu"))
    x, weight, bias = (t.clone().requires_grad_() for t in (g.x, g.weight, g.bias))
    y = F.group_norm(x, 3, weight, bias)
    expected = torch.autograd.grad(y, (x, weight, bias), g.dy)
    found = groupnorm.group_norm_backward(g.dy, g.x, g.weight, 3, 1e-5)
    assert_close(groupnorm.group_norm(g.x, g.weight, g.bias, 3, 1e-5), y)
    assert_close(found, expected)
    assert found[0].stride() == g.x.stride()
    values = [
        v for v, _ in exact.group_norm(g.x, g.dy, 3, g.weight, g.bias, 1e-5).results(g.x, g.dy).values()
    ]
    assert_close(values, [y.detach(), *expected])


def test_layer_norm() -> None:
    x, weight, bias = (data(*s, dtype=torch.float64) for s in ((4, 2, 3), (2, 3), (2, 3)))
    assert_close(layernorm.layer_norm(x, weight, bias, 2, 1e-5), F.layer_norm(x, (2, 3), weight, bias))
