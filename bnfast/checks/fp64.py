"""The expected results of a step of a case in fp64, with the scale of each element (bnfast.exact explains the
rule), and the comparison with them."""

from __future__ import annotations

import torch
from torch import Tensor

from bnfast import exact

from . import reference_layers
from .cases import Case, Given
from .one_step import run

# InstanceNorm's running statistics are computed by torch.var_mean, whose error we cannot bound as tightly.
TORCHS_OWN = 8.0


# y and dx; and the gradients of parameters and the running statistics, by name
Truth = tuple[exact.Exact, dict[str, exact.Value]]


def of(case: Case, tensors: Given, pairs: exact.Pairs | None = None) -> Truth:
    """The expected results. pairs: chunks of (x, dy), [N, C, *] each, where the whole does not fit into
    memory in fp64 (not of LayerNorm)."""
    if case.layer == "BatchRenorm" and case.training:
        return _renormalized(case, tensors, pairs)
    x, dy, weight, bias = tensors.x, tensors.dy, tensors.weight, tensors.bias
    if case.layer == "LayerNorm":
        normal = exact.layer_norm(x, dy, weight, bias, case.eps)
    else:
        fixed = None if case.batch else (tensors.running_mean, tensors.running_var)
        groups = case.in_sample if case.batch else 0
        normal = exact.batch_norm(x, dy, weight, bias, case.eps, fixed, pairs, groups)
    running = _running(case, tensors, normal) if case.tracked else {}
    return normal, _gradients(tensors, normal.dweight(), normal.dbias()) | running


def expectations(case: Case, tensors: Given) -> dict[str, exact.Value]:
    """The expected value of everything that a step returns or writes, except the batch counter."""
    normal, vectors = of(case, tensors)
    return {"y": normal.y(tensors.x), "dx": normal.dx(tensors.x, tensors.dy), **vectors}


def judge(case: Case, tensors: Given, ours: dict[str, Tensor]) -> dict[str, exact.Verdict]:
    """Compares what `one_step.run` returned for these tensors with fp64 and with torch. Raises AssertionError
    where a result is missing or unexpected, has another shape or dtype than torch's, or the batch counter
    differs."""
    theirs, expected = run(case, reference_layers, tensors), expectations(case, tensors)
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = (None if t is None else (t.shape, t.dtype) for t in (ours.get(name), theirs.get(name)))
        if mine != other:
            raise AssertionError(f"{case}: {name} is {mine}, and torch's is {other}")
    if case.tracked and not torch.equal(ours["num_batches_tracked"], theirs["num_batches_tracked"]):
        raise AssertionError(f"{case}: num_batches_tracked is not torch's")
    wide = exact.accumulator(case.dtype)
    return {name: exact.judge(ours[name], theirs[name], true, wide) for name, true in expected.items()}


def _gradients(tensors: Given, dweight: exact.Value, dbias: exact.Value) -> dict[str, exact.Value]:
    """The gradients of those parameters that exist."""
    found = {} if tensors.weight is None else {"dweight": dweight}
    return found if tensors.bias is None else found | {"dbias": dbias}


def _running(case: Case, tensors: Given, normal: exact.Exact) -> dict[str, exact.Value]:
    """The running statistics after a step that started at `Case.batches`."""
    mean, variance = tensors.running_mean, tensors.running_var
    if not case.training:
        kept = {"running_mean": mean.double(), "running_var": variance.double()}
        return {name: (t, t.abs()) for name, t in kept.items()}
    if case.layer != "InstanceNorm":
        return normal.running(mean, variance, case.factor)
    n = case.shape[0]
    by_sample = normal.running(mean.repeat(n), variance.repeat(n), case.factor)
    averaged = {name: [t.view(n, -1).mean(0) for t in pair] for name, pair in by_sample.items()}
    return {name: (value, TORCHS_OWN * scale) for name, (value, scale) in averaged.items()}


def _limits(case: Case) -> tuple[float, float]:
    """(largest r, largest d) of a batch after `Case.batches` others."""
    if case.momentum is None:  # this collects statistics
        return 1.0, 0.0
    r_max, d_max, warmup, r_steps, d_steps = case.schedule

    def reached(steps: float) -> float:
        return 1.0 if case.batches >= steps else max(0.0, (case.batches - warmup) / (steps - warmup))

    return 1 + (r_max - 1) * reached(r_steps), d_max * reached(d_steps)


def _renormalized(case: Case, tensors: Given, pairs: exact.Pairs | None) -> Truth:
    """Ioffe 2017, algorithm 1, as a BatchNorm with r * gamma for gamma and d * gamma + beta for beta."""
    x, dy = tensors.x, tensors.dy
    batch = exact.batch_norm(x, dy, None, None, case.eps, None, pairs)
    mean, sigma = batch.mean.flatten(), (batch.variance.flatten() + case.eps).sqrt()
    old_mean = tensors.running_mean.double()
    old_sigma = (tensors.running_var.double() + case.eps).sqrt()
    r_limit, d_limit = _limits(case)
    r = (sigma / old_sigma).clamp(1 / r_limit, r_limit)
    d = ((mean - old_mean) / old_sigma).clamp(-d_limit, d_limit)
    gamma = torch.ones_like(r) if tensors.weight is None else tensors.weight.double()
    beta = torch.zeros_like(r) if tensors.bias is None else tensors.bias.double()
    # a d that is not clipped has the rounding of the batch's mean
    size_d = d.abs() + (d.abs() < d_limit) * mean.abs() / old_sigma
    size = gamma.abs() * size_d + beta.abs()
    normal = exact.batch_norm(x, dy, gamma * r, gamma * d + beta, case.eps, None, pairs, bias_size=size)
    (sum_gx, size_gx), (sum_g, size_g) = normal.dweight(), normal.dbias()
    dweight = r * sum_gx + d * sum_g, r * size_gx + size_d * size_g
    new_sigma = old_sigma + case.factor * (sigma - old_sigma)
    new_variance = (new_sigma.square() - case.eps).clamp_min(0)
    running = {
        "running_mean": normal.running(old_mean, old_sigma, case.factor)["running_mean"],
        # a square's relative error is twice its root's
        "running_var": (new_variance, 2 * new_sigma.square()),
    }
    return normal, _gradients(tensors, dweight, normal.dbias()) | running
