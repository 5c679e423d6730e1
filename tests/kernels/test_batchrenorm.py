"""Batch Renormalization against fp64; its schedule and its edges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bnfast
from bnfast import functional
from bnfast.checks import fp64, one_step
from bnfast.checks.cases import Case, batch_renorm, given
from tests.support import oracle
from tests.support.buffers import bit_identical
from tests.support.families import BF16, FP32, FP64, in_dtypes, varied
from tests.support.layers import data, every_path

pytestmark = pytest.mark.compiled

CPU = torch.device("cpu")
# planes, rows, odd rows, a run in pieces
SHAPES = [
    batch_renorm((6, 13, 5, 5)),
    batch_renorm((6, 24, 3, 4), channels_last=True),
    batch_renorm((4, 13, 3, 3), channels_last=True),
    batch_renorm((2, 3, 70, 66)),
]
LIMITS = [{"schedule": (r_max, d_max, 0, 0, 0)} for r_max, d_max in ((1.0, 0.0), (1.2, 0.1), (100.0, 100.0))]
CASES = varied(SHAPES, *LIMITS, {"training": False})


@every_path
@pytest.mark.parametrize("case", in_dtypes(CASES, (FP32, FP64, BF16)), ids=str)
def test_against_fp64(case: Case, path: str) -> None:
    if path == "kernels":
        oracle.check(case, CPU)
    else:  # plain torch's elements are no better than torch's own are
        g = given(case, CPU)
        found = one_step.run(case, bnfast, g)
        for name, verdict in fp64.judge(case, g, found).items():
            dtype = found[name].dtype
            assert verdict.rms <= (4 if dtype == BF16 else 8) * torch.finfo(dtype).eps, name


@every_path
def test_gradients_of_all_orders(path: str) -> None:
    # in the interpreter every difference is a launch
    x = data(*((3, 2, 2, 3) if path == "torch" else (2, 2, 2, 1)), dtype=FP64)
    leaves = [t.requires_grad_() for t in (x, data(2, seed=1, dtype=FP64), data(2, seed=2, dtype=FP64))]

    def limited(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # r and d carry no gradient, which finite differences cannot know: at their limits they are constant
        mean, var = torch.full((2,), 9.0, dtype=FP64), torch.full((2,), 1e-4, dtype=FP64)
        return functional.batch_renorm(x, mean, var, weight, bias, True, 0.1, 1e-3, 1.5, 0.5)

    assert torch.autograd.gradcheck(limited, leaves)
    assert torch.autograd.gradgradcheck(limited, leaves)


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
    module.num_batches_tracked.fill_(10_000_000)
    torch.testing.assert_close(module(x), plain * 3 + 5, rtol=1e-4, atol=1e-4)
    module.reset_schedule()
    torch.testing.assert_close(module(x), plain, rtol=1e-4, atol=1e-4)
    assert module.num_batches_tracked == 1


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
    for _ in range(2):
        before = copy.deepcopy(module).eval()(x)
        y = module(x)
    torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-4)
    assert module.running_mean.isfinite().all()
    assert module.running_var.isfinite().all()


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
