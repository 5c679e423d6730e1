"""Batch Renormalization against algorithm 1 of Ioffe 2017 in fp64; its identities, schedule and edges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfast
from bnfast.functional import batch_renorm
from tests.support.buffers import bit_identical, nan_filled_allocations
from tests.support.layers import every_path

SHAPES = {
    "nchw_packed": ((6, 13, 5, 5), torch.contiguous_format),
    "rows": ((6, 24, 3, 4), torch.channels_last),
    "odd rows": ((4, 13, 3, 3), torch.channels_last),
    "a run in pieces": ((2, 3, 70, 66), torch.contiguous_format),
}
WIDE = {torch.float64: torch.float64}


def given(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    c = shape[1]
    wide = WIDE.get(dtype, torch.float32)
    vectors = {
        "weight": random(c),
        "bias": random(c),
        "running_mean": random(c) * 0.5,
        "running_var": random(c).square() + 0.3,
    }
    return {
        "x": (random(*shape) * 1.5 + 0.5).to(dtype).contiguous(memory_format=memory_format),
        "dy": random(*shape).to(dtype).contiguous(memory_format=memory_format),
        **{name: v.to(wide) for name, v in vectors.items()},
    }


def algorithm_1(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, momentum: float, eps: float,
    r_max: float, d_max: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As printed, line by line: (y, new running mean, new running variance)."""
    dims = [0, *range(2, x.dim())]
    view = (1, -1, *[1] * (x.dim() - 2))
    sigma = (var + eps).sqrt()
    mu_b = x.mean(dims)
    sigma_b = (eps + (x - mu_b.view(view)).square().mean(dims)).sqrt()
    r = (sigma_b / sigma).clamp(1 / r_max, r_max).detach()
    d = ((mu_b - mean) / sigma).clamp(-d_max, d_max).detach()
    xhat = (x - mu_b.view(view)) / sigma_b.view(view) * r.view(view) + d.view(view)
    y = weight.view(view) * xhat + bias.view(view)
    new_mean = mean + momentum * (mu_b - mean)
    new_sigma = sigma + momentum * (sigma_b - sigma)
    return y, new_mean.detach(), (new_sigma.square() - eps).clamp_min(0).detach()


def step(t: dict[str, Tensor], dtype: torch.dtype | None, function: Any, **options: Any) -> dict[str, Tensor]:
    """One training step in a dtype (None: as given): everything it returns and writes."""
    t = {name: v.clone() if dtype is None else v.to(dtype) for name, v in t.items()}
    x, weight, bias = (t[name].requires_grad_() for name in ("x", "weight", "bias"))
    y, mean, var = function(x, t["running_mean"], t["running_var"], weight, bias, **options)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], t["dy"])
    return {"y": y.detach(), "dx": dx, "dweight": dweight, "dbias": dbias, "mean": mean, "var": var}


def ours(
    x: Tensor, mean: Tensor, var: Tensor, *rest: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return batch_renorm(x, mean, var, *rest, training=True, **options), mean, var


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@every_path
@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.2, 0.1), (100.0, 100.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "memory_format"), SHAPES.values(), ids=SHAPES.keys())
def test_algorithm_1(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype,
    limits: tuple[float, float], path: str, launches: list[Any],
) -> None:  # fmt: skip
    """Against the algorithm in fp64: at most twice its own error in the same dtype, plus a few ulp."""
    t = given(shape, memory_format, dtype)
    options = {"momentum": 0.1, "eps": 1e-3, "r_max": limits[0], "d_max": limits[1]}
    before = {name: v.clone() for name, v in t.items()}
    exact = step(t, torch.float64, algorithm_1, **options)
    with nan_filled_allocations():
        found = step(t, None, ours, **options)
    assert len(launches) == (4 if path == "kernels" else 0), "two launches each way"
    plain = step(t, WIDE.get(dtype, torch.float32), algorithm_1, **options)
    for name, value in exact.items():
        ulp = torch.finfo(dtype if name in ("y", "dx") else t["weight"].dtype).eps
        limit = 2 * error(plain[name], value) + (32 if dtype == torch.float64 else 4) * ulp
        assert error(found[name], value) <= limit, name
    for name in ("x", "dy", "weight", "bias"):
        assert bit_identical(t[name], before[name]), name
    assert found["y"].stride() == t["x"].stride() == found["dx"].stride()


@every_path
def test_without_limits_it_is_batch_norm(path: str) -> None:
    t = given(*SHAPES["rows"], torch.float64)

    def plain(x: Tensor, mean: Tensor, var: Tensor, *rest: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return nn.functional.batch_norm(x, None, None, *rest, True, 0.1, 1e-3), mean, var

    options = {"momentum": 0.1, "eps": 1e-3, "r_max": 1.0, "d_max": 0.0}
    renormed, expected = step(t, None, ours, **options), step(t, None, plain, **options)
    for name in ("y", "dx", "dweight", "dbias"):
        torch.testing.assert_close(renormed[name], expected[name], rtol=1e-12, atol=1e-12)


@every_path
def test_unclipped_training_equals_eval_before_the_update(path: str) -> None:
    t = given(*SHAPES["nchw_packed"], torch.float64)
    arguments = (t["weight"], t["bias"])
    evaluated = batch_renorm(t["x"], t["running_mean"], t["running_var"], *arguments)
    trained = batch_renorm(
        t["x"], t["running_mean"], t["running_var"], *arguments, training=True, r_max=1e6, d_max=1e6
    )
    torch.testing.assert_close(trained, evaluated, rtol=1e-12, atol=1e-12)


@every_path
def test_gradients_of_all_orders(path: str) -> None:
    # in the interpreter every difference is a launch
    shape = (3, 2, 2, 3) if path == "torch" else (2, 2, 2, 1)
    t = given(shape, torch.contiguous_format, torch.float64)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = t["running_mean"].clone(), t["running_var"].clone()
        # r and d carry no gradient, which finite differences cannot know: at their limits they are constant
        return batch_renorm(x, mean + 9, var * 1e-4, weight, bias, True, 0.1, 1e-3, 1.5, 0.5)

    leaves = [t[name].requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@every_path
def test_schedule(path: str) -> None:
    """r's limit is 1 for batches 0 to 2 and then rises to 3 at batch 6; d's rises from 0 to 5 at batch 4. The
    batch's own number counts the batches before it."""
    module = bnfast.BatchRenorm2d(3, momentum=0.0, warmup_steps=2, r_max_steps=6, d_max_steps=4, affine=False)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 10 + 100
    for batch, (r, d) in enumerate(((1, 0), (1, 0), (1, 0), (1.5, 2.5), (2, 5), (2.5, 5), (3, 5), (3, 5))):
        plain = nn.functional.batch_norm(x, None, None, training=True)
        torch.testing.assert_close(module(x), plain * r + d, rtol=1e-4, atol=1e-4)
        assert module.num_batches_tracked == batch + 1
    module.reset_schedule()
    torch.testing.assert_close(module(x), plain, rtol=1e-4, atol=1e-4)
    assert module.num_batches_tracked == 1


@every_path
def test_long_schedule_stays_within_its_limits(path: str) -> None:
    module = bnfast.BatchRenorm1d(2, momentum=0.0, warmup_steps=2, r_max_steps=6, d_max_steps=4, affine=False)
    module.num_batches_tracked.fill_(10_000_000)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) * 10 + 100
    plain = nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(module(x), plain * 3 + 5, rtol=1e-4, atol=1e-4)


@every_path
def test_cumulative_average_of_sigma(path: str) -> None:
    """torch.optim.swa_utils.update_bn resets the statistics and sets momentum to None."""
    module = bnfast.BatchRenorm2d(3, warmup_steps=0, r_max_steps=0, d_max_steps=0)
    module.num_batches_tracked.fill_(77)
    data = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(n)) * (n + 1) for n in range(3)]
    torch.optim.swa_utils.update_bn(data, module)
    sigmas = [(d.var((0, 2, 3), correction=0) + module.eps).sqrt() for d in data]
    torch.testing.assert_close(module.running_mean, sum(d.mean((0, 2, 3)) for d in data) / 3)
    torch.testing.assert_close((module.running_var + module.eps).sqrt(), sum(sigmas) / 3)
    assert module.momentum == 0.01


@every_path
def test_a_batch_that_overflowed(path: str) -> None:
    """As under loss scaling: the step is thrown away, and the running statistics must not remember it."""
    x = torch.randn(4, 3, 2, 2)
    x[0, 1, 0, 0] = float("inf")
    module = bnfast.BatchRenorm2d(3)
    before = copy.deepcopy(module.state_dict())
    y = module(x)
    assert not y[:, 1].isfinite().all()
    assert y[:, [0, 2]].isfinite().all()
    assert module.running_mean[1] == before["running_mean"][1]
    assert module.running_var[1] == before["running_var"][1]
    assert (module.running_mean[[0, 2]] != before["running_mean"][[0, 2]]).all()
    trusting = bnfast.BatchRenorm2d(3, skip_nonfinite=False)
    trusting(x)
    assert not trusting.running_mean[1].isfinite()


@every_path
def test_collecting_statistics_shows_what_it_was_given(path: str) -> None:
    """With a batch left out, the average would be of something else, and nobody would see it."""
    module = bnfast.BatchRenorm2d(2)
    module.momentum = None
    module(torch.full((3, 2, 2, 2), float("nan")))
    assert module.running_mean.isnan().all()
    assert module.running_var.isnan().all()


@every_path
def test_limits_may_be_infinite(path: str) -> None:
    """Not before the schedule begins, and without NaN."""
    inf = float("inf")
    x = torch.randn(8, 3, 4, 4) * 3 + 10
    module = bnfast.BatchRenorm2d(3, r_max=inf, d_max=inf, warmup_steps=1, r_max_steps=3, d_max_steps=3)
    torch.testing.assert_close(module(x), nn.BatchNorm2d(3)(x))
    mean, variance = (t.clone().view(1, -1, 1, 1) for t in (module.running_mean, module.running_var))
    for _ in range(2):
        before = copy.deepcopy(module).eval()(x)
        y = module(x)
    torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-4)
    assert mean.isfinite().all()
    assert variance.isfinite().all()


@every_path
def test_a_variance_that_overflows(path: str) -> None:
    """Of finite values with a finite mean."""
    x = torch.tensor([1e25, -1e25, 3e24]).view(3, 1, 1, 1)
    module = bnfast.BatchRenorm2d(1)
    module(x)
    assert module.running_mean.item() == 0.0
    assert module.running_var.item() == 1.0


@every_path
def test_a_constant_channel_never_gets_a_negative_variance(path: str) -> None:
    module = bnfast.BatchRenorm2d(4, momentum=1.0)
    module(torch.linspace(-3, 5, 4).view(1, 4, 1, 1).expand(6, 4, 2, 2))
    assert (module.running_var >= 0).all()


@every_path
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (4, 2, 0, 3)], ids=str)
def test_a_batch_without_values_only_counts(shape: tuple[int, ...], path: str) -> None:
    module = bnfast.BatchRenorm2d(2, skip_nonfinite=False)
    before = copy.deepcopy(module.state_dict())
    assert module(torch.empty(shape)).shape == shape
    before["num_batches_tracked"] += 1
    for name, value in module.state_dict().items():
        assert bit_identical(value, before[name]), name
