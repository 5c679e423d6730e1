"""What BatchNorm and Batch Renormalization have as modules, beside the contract: old checkpoints, averages of
weights, `affine`, which tells who reads it; and what Batch Renormalization refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnfast
from bnfast.functional import batch_renorm
from tests.support.buffers import bit_identical
from tests.support.layers import BY_NAME, assert_same, data, every_path, step
from tests.support.versions import TORCH


def test_version_1_checkpoint_loads_strictly() -> None:
    """Checkpoints from before torch 0.4.1 know no num_batches_tracked."""
    layer = BY_NAME["BatchNorm2d"]
    ours, theirs = layer.pair()
    step(theirs, layer.input())
    new = theirs.state_dict()
    new.pop("num_batches_tracked")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(new, strict=True)
    new._metadata[""]["version"] = 1
    ours.num_batches_tracked.fill_(3)
    ours.load_state_dict(new, strict=True)
    assert ours.num_batches_tracked == 3  # torch's rule: what the file lacks stays as it is
    assert_close(ours.running_mean, theirs.running_mean, rtol=0, atol=0)


@every_path
def test_update_bn(path: str) -> None:
    """Stochastic weight averaging recomputes the statistics, as a cumulative average over three batches."""
    pair = [nn.Sequential(layer) for layer in BY_NAME["BatchNorm2d"].pair()]
    batches = [data(n, 4, 5, 5, seed=n) for n in (2, 3, 4)]
    for model in pair:
        torch.optim.swa_utils.update_bn(batches, model)
    assert pair[0][0].momentum == 0.1
    assert_same(*(model.state_dict() for model in pair))


class Reading(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.bn = kind(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y * 2 if self.bn.affine else y


@pytest.mark.usefixtures("plain_torch_in_one_thread")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [bnfast.BatchNorm2d, bnfast.BatchRenorm2d])
@pytest.mark.parametrize("exported", [False, True], ids=["compiled", "exported"])
def test_it_is_read_in_graphs(exported: bool, kind: Any, affine: bool) -> None:
    torch._dynamo.reset()
    model, x = Reading(kind, affine=affine, activation="relu").eval(), data(2, 3, 4, 4)
    if exported:
        captured = torch.export.export(model, (x,), strict=True).module()
    else:
        captured = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(captured(x), model(x))


@pytest.mark.usefixtures("plain_torch_in_one_thread")
@pytest.mark.skipif(TORCH < (2, 14), reason="Dynamo reads the weight for it")
def test_graphs_are_made_again_when_it_changes() -> None:
    torch._dynamo.reset()
    model, x = Reading(bnfast.BatchNorm2d).eval(), data(2, 3, 4, 4)
    captured = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(captured(x), 2 * model.bn(x))
    model.bn.affine = False
    assert_close(captured(x), model.bn(x))


# Batch Renormalization

X = data(4, 3, 2, 2)


def assert_untouched(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert bit_identical(value, state[name]), name


@every_path
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled inside", "compiled around"])
def test_recomputation_is_refused(how: str, path: str) -> None:
    """In compiled code what the call is part of shows only when it runs. (PyTorch 2.11's compiler keeps what
    the kernels have made in such a part, and computes nothing again.)"""
    torch._dynamo.reset()
    module = bnfast.BatchRenorm2d(3, warmup_steps=0, r_max_steps=1, d_max_steps=1)
    twin, x = copy.deepcopy(module), X.clone().requires_grad_()
    if how == "compiled around":
        call = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), backend="aot_eager")
        y = call(x)
    else:
        call = torch.compile(module, backend="aot_eager") if how == "compiled inside" else module
        y = checkpoint(call, x, use_reentrant=how == "reentrant")
    state = copy.deepcopy(module.state_dict())
    if TORCH == (2, 11) and path == "kernels" and how == "compiled around":
        found, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, twin(x)))
        assert bit_identical(found, expected)
    else:
        with pytest.raises(RuntimeError, match="within a backward"):
            y.square().sum().backward()
    assert_untouched(module, state)


def test_state_loads_both_ways() -> None:
    batch_norm, renorm = nn.BatchNorm2d(3), bnfast.BatchRenorm2d(3)
    batch_norm(X * 3 + 1)
    assert batch_norm.state_dict().keys() == renorm.state_dict().keys()
    renorm.load_state_dict(batch_norm.state_dict(), strict=True)
    assert_close(renorm.eval()(X), batch_norm.eval()(X))
    batch_norm.load_state_dict(renorm.state_dict(), strict=True)


VECTORS = ("running_mean", "running_var", "weight", "bias")
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r_max": 0.9}, ValueError, "r_max must be at least 1"),
    ({"r_max": 0.1, "training": False}, ValueError, "r_max must be at least 1"),
    ({"d_max": float("nan")}, ValueError, "d_max"),
    ({"eps": 0.0}, ValueError, "eps"),
    ({"momentum": None}, TypeError, "momentum"),
    ({"training": "yes"}, TypeError, "training"),
    ({"running_mean": None, "running_var": None}, ValueError, "running_mean"),
    ({"input": X[:1, :, :1, :1]}, ValueError, "more than 1 value"),
    *(
        ({"input": X.to(dtype)}, TypeError, str(dtype))
        for dtype in (torch.bool, torch.int64, torch.complex64, torch.float8_e5m2)
    ),
    *(
        ({name: torch.ones(size)}, RuntimeError, rf"{name} should be of shape \[3\], but got \[{size}\]")
        for name in VECTORS
        for size in (1, 2, 4)
    ),
]


@every_path
@pytest.mark.parametrize(("replaced", "error", "words"), REFUSED, ids=[f"{[*r]} {w}" for r, _, w in REFUSED])
def test_calls_it_refuses(replaced: dict[str, Any], error: type[Exception], words: str, path: str) -> None:
    vectors = {name: data(3, seed=n).abs() for n, name in enumerate(VECTORS)}
    given: dict[str, Any] = {"input": X, **vectors, "training": True, **replaced}
    before = copy.deepcopy(given)
    with pytest.raises(error, match=words):
        batch_renorm(**given)
    assert all(bit_identical(given[name], t) for name, t in before.items() if isinstance(t, Tensor))


@every_path
def test_limits_may_be_tensors(path: str) -> None:
    found, expected = (
        batch_renorm(X, torch.zeros(3), torch.ones(3), training=True, r_max=r_max, d_max=d_max)
        for r_max, d_max in ((torch.tensor(2.0), torch.tensor(1)), (2.0, 1.0))
    )
    assert_close(found, expected)


@every_path
def test_statistics_that_cannot_be_written_to(path: str) -> None:
    with torch.inference_mode():
        inference = bnfast.BatchRenorm2d(3)
    integers = bnfast.BatchRenorm2d(3)
    integers.running_mean = torch.zeros(3, dtype=torch.int32)
    cases = (
        (inference, RuntimeError, "inference tensor"),
        (integers, TypeError, "running_mean should be of floating point"),
    )
    for module, error, words in cases:
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(error, match=words):
            module(X)
        assert_untouched(module, before)


def test_is_a_batchnorm_but_not_torchs() -> None:
    """Freezers look for the first class, converters replace the second."""
    assert issubclass(bnfast.BatchRenorm2d, nn.modules.batchnorm._BatchNorm)
    assert not issubclass(bnfast.BatchRenorm2d, nn.BatchNorm2d)
    assert "r_max=3.0" in repr(bnfast.BatchRenorm2d(3))
    with pytest.raises(RuntimeError, match="torch.export"):
        torch.jit.script(bnfast.BatchRenorm2d(3))
