"""FrozenBatchNorm2d beside the contract: the keys and dtypes of torchvision's and detectron2's layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnfast
from tests.support.convertible import DetectronFrozen, TorchvisionFrozen
from tests.support.layers import BY_NAME, DTYPES, data, every_path

KEYS = ["weight", "bias", "running_mean", "running_var"]
X = data(3, 4, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("kind", [TorchvisionFrozen, DetectronFrozen])
def test_same_keys_as_theirs(kind: type[nn.Module]) -> None:
    ours, theirs = bnfast.FrozenBatchNorm2d(4), kind(4)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == KEYS
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(X.float()), theirs(X.float()))
    theirs.load_state_dict(bnfast.FrozenBatchNorm2d(4).state_dict())
    # For another version, detectron2's older releases change running_var where they find a lower one.
    assert ours.state_dict()._metadata[""]["version"] == DetectronFrozen._version


def test_a_new_one_changes_almost_nothing() -> None:
    layer = bnfast.FrozenBatchNorm2d(4, eps=0.0, dtype=torch.float64)
    assert_close(layer(X), X, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"keep_dtype": True}], ids=str)
def test_its_arguments_are_shown(options: dict[str, Any]) -> None:
    shown = "".join(f", {name}={value}" for name, value in options.items())
    assert repr(bnfast.FrozenBatchNorm2d(4, **options)) == f"FrozenBatchNorm2d(4, eps=1e-05{shown})"


def test_loads_a_batchnorm_strictly() -> None:
    """Its counter is dropped, from the model's own state_dict at no time; other keys still count."""
    batch_norm = BY_NAME["BatchNorm2d"].pair(dtype=torch.float64)[1]
    batch_norm(X * 2 + 1)
    source, model = nn.Sequential(batch_norm), nn.Sequential(bnfast.FrozenBatchNorm2d(4, dtype=torch.float64))
    state = source.state_dict()
    assert model.load_state_dict(state) == ([], [])
    assert_close(model(X), source.eval()(X))
    assert "0.num_batches_tracked" in state
    with pytest.raises(RuntimeError, match='Missing key.*"0.bias"'):
        model.load_state_dict({key: value for key, value in state.items() if key != "0.bias"})
    with pytest.raises(RuntimeError, match='Unexpected key.*"0.other"'):
        model.load_state_dict({**state, "0.other": torch.zeros(4)})


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4), (2, 4, 3, 3, 3)])
def test_takes_four_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected 4D input \(got {len(shape)}D input\)"):
        bnfast.FrozenBatchNorm2d(4)(torch.zeros(shape))


WIDER = [(TorchvisionFrozen, False, dtype, constants) for dtype in DTYPES for constants in DTYPES]
KEPT = [(DetectronFrozen, True, dtype, torch.float32) for dtype in (torch.float16, torch.bfloat16)]


@every_path
@pytest.mark.parametrize("added", [True, False], ids=["with a residual", "alone"])
@pytest.mark.parametrize(("kind", "keep_dtype", "dtype", "constants"), [*WIDER, *KEPT])
def test_dtypes(
    kind: Any, keep_dtype: bool, dtype: torch.dtype, constants: torch.dtype, added: bool, path: str
) -> None:
    """The output's is the wider one of input and constants, as torchvision's arithmetic makes it, also for
    what torch's batch_norm refuses to mix; with keep_dtype it is the input's, as detectron2's."""
    theirs = kind(4).to(constants)
    ours = bnfast.FrozenBatchNorm2d(4, dtype=constants, keep_dtype=keep_dtype)
    ours.load_state_dict(theirs.state_dict())
    x, z = X.to(dtype, copy=True).requires_grad_(), X.to(dtype) if added else torch.zeros((), dtype=dtype)
    y = ours(x, residual=z if added else None)
    assert y.dtype == (theirs(x) + z).dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    expected = theirs.double()(x.double()) + z
    units = 1 if keep_dtype and not added else 4
    bound = units * torch.finfo(y.dtype).eps * expected.abs().max().item()
    assert_close(y.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("keep_dtype", [True, False])
@pytest.mark.parametrize("reverted", [True, False])
def test_residuals_of_both_dtypes(keep_dtype: bool, reverted: bool) -> None:
    """The layer in plain torch takes the same ones."""
    layer = bnfast.FrozenBatchNorm2d(4, activation="relu", keep_dtype=keep_dtype)
    layer = bnfast.revert(layer) if reverted else layer
    x = X.bfloat16()
    output = torch.bfloat16 if keep_dtype else torch.float32
    for dtype in {torch.bfloat16, output}:
        z = x.to(dtype)
        y = layer(x, residual=z)
        assert y.dtype == output
        assert_close(y, layer(x, residual=z.to(output)), rtol=0, atol=0)
    with pytest.raises(ValueError, match="residual must have input's dtype"):
        layer(x, residual=x.double())
    with pytest.raises(TypeError, match="residual must be a Tensor or None, but got float"):
        layer(x, residual=1.0)


@pytest.mark.parametrize("keep_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_is_fused_with_what_follows(dtype: torch.dtype, keep_dtype: bool) -> None:
    """The backbone of a detector, in fp64 and with half-precision input to fp32 constants."""
    model = nn.Sequential(nn.Identity(), bnfast.FrozenBatchNorm2d(4, keep_dtype=keep_dtype), nn.ReLU())
    model = model.double() if dtype == torch.float64 else model
    fused = bnfast.fuse(copy.deepcopy(model))
    assert len(bnfast.fusion_report(fused).fused) == 1
    found, expected = (m(X.to(dtype)) for m in (fused, model))
    assert found.dtype == expected.dtype == (dtype if keep_dtype or dtype == torch.float64 else torch.float32)
    assert_close(found, expected)
