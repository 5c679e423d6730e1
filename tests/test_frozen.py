"""FrozenBatchNorm2d: a BatchNorm2d in eval whatever its mode, with gradients to its input alone. On the
kernels (interpreted) and on the plain-torch path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support.foreign import DetectronFrozen, TorchvisionFrozen
from tests.support.layers import DTYPES, every_path
from tests.support.layers import data as of_dtype

KEYS = ["weight", "bias", "running_mean", "running_var"]


def data() -> Tensor:
    return of_dtype(3, 4, 5, 6, dtype=torch.float64)


def trained() -> nn.BatchNorm2d:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(4, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer(torch.randn(3, 4, 5, 5, dtype=torch.float64) * 2 + 1)
    return layer.eval()


@every_path
def test_activation_and_residual(path: str) -> None:
    theirs = trained()
    ours = bnfast.FrozenBatchNorm2d(4, dtype=torch.float64, activation="relu")
    ours.load_state_dict(theirs.state_dict())
    x, z = data().requires_grad_(), data().cos().requires_grad_()
    ours(x, residual=z).sum().backward()
    found = [x.grad, z.grad]
    x.grad = z.grad = None
    torch.relu(theirs(x) + z).sum().backward()
    assert_close(found, [x.grad, z.grad], rtol=1e-12, atol=1e-12)
    assert repr(ours) == "FrozenBatchNorm2d(4, eps=1e-05, activation=relu)"


@pytest.mark.parametrize("kind", [TorchvisionFrozen, DetectronFrozen])
def test_same_keys_as_theirs(kind: type[nn.Module]) -> None:
    ours, theirs = bnfast.FrozenBatchNorm2d(4), kind(4)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == KEYS
    ours.load_state_dict(theirs.state_dict())
    x = data().float()
    assert_close(ours(x), theirs(x))
    theirs.load_state_dict(bnfast.FrozenBatchNorm2d(4).state_dict())


def test_a_new_one_changes_almost_nothing() -> None:
    layer, x = bnfast.FrozenBatchNorm2d(4, eps=0.0, dtype=torch.float64), data()
    assert_close(layer(x), x, rtol=0, atol=0)
    assert layer.running_var.dtype == torch.float64
    assert bnfast.FrozenBatchNorm2d(4, device="meta").weight.is_meta
    assert repr(layer) == "FrozenBatchNorm2d(4, eps=0.0)"


def test_loads_a_batchnorm_strictly() -> None:
    """Its counter is dropped, from the model's own state_dict at no time; other keys still count."""
    state = nn.Sequential(trained()).state_dict()
    model = nn.Sequential(bnfast.FrozenBatchNorm2d(4))
    assert model.load_state_dict(state) == ([], [])
    assert "0.num_batches_tracked" in state
    with pytest.raises(RuntimeError, match='Missing key.*"0.bias"'):
        model.load_state_dict({key: value for key, value in state.items() if key != "0.bias"})
    with pytest.raises(RuntimeError, match='Unexpected key.*"0.other"'):
        model.load_state_dict({**state, "0.other": torch.zeros(4)})


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4), (2, 4, 3, 3, 3)])
def test_takes_four_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected 4D input \(got {len(shape)}D input\)"):
        bnfast.FrozenBatchNorm2d(4)(torch.zeros(shape))


@every_path
@pytest.mark.parametrize("constants", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_wider_dtype_is_the_outputs(dtype: torch.dtype, constants: torch.dtype, path: str) -> None:
    """torchvision's arithmetic is the reference, also for what torch's batch_norm refuses to mix."""
    theirs = TorchvisionFrozen(4).to(constants)
    ours = bnfast.FrozenBatchNorm2d(4, dtype=constants)
    ours.load_state_dict(theirs.state_dict())
    x = data().to(dtype).requires_grad_()
    y = ours(x, residual=data().to(dtype))
    assert y.dtype == (theirs(x) + data().to(dtype)).dtype
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    expected = theirs.double()(x.double()) + data().to(dtype)
    bound = 4 * torch.finfo(y.dtype).eps * expected.abs().max().item()
    assert_close(y.double(), expected, rtol=0, atol=bound)


@every_path
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keep_dtype_keeps_it(dtype: torch.dtype, path: str) -> None:
    theirs = DetectronFrozen(4)
    ours = bnfast.FrozenBatchNorm2d(4, keep_dtype=True)
    ours.load_state_dict(theirs.state_dict())
    x = data().to(dtype)
    y = ours(x)
    assert y.dtype == theirs(x).dtype == dtype
    expected = theirs.double()(x.double())
    assert_close(y.double(), expected, rtol=0, atol=torch.finfo(dtype).eps * expected.abs().max().item())
    assert repr(ours) == "FrozenBatchNorm2d(4, eps=1e-05, keep_dtype=True)"


@pytest.mark.parametrize("keep_dtype", [True, False])
@pytest.mark.parametrize("reverted", [True, False])
def test_residuals_of_both_dtypes(keep_dtype: bool, reverted: bool) -> None:
    """The layer in plain torch takes the same ones."""
    layer = bnfast.FrozenBatchNorm2d(4, activation="relu", keep_dtype=keep_dtype)
    layer = bnfast.revert(layer) if reverted else layer
    x = data().bfloat16()
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


def test_state_of_the_version_that_detectron2_asks_for() -> None:
    """Its older releases change running_var where they find a lower one."""
    metadata: Any = bnfast.FrozenBatchNorm2d(4).state_dict()._metadata
    assert metadata[""]["version"] == DetectronFrozen._version


@pytest.mark.parametrize("keep_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_is_fused_with_what_follows(dtype: torch.dtype, keep_dtype: bool) -> None:
    """The backbone of a detector, in fp64 and with half-precision input to fp32 constants."""
    model = nn.Sequential(nn.Identity(), bnfast.FrozenBatchNorm2d(4, keep_dtype=keep_dtype), nn.ReLU())
    model = model.double() if dtype == torch.float64 else model
    expected = model(data().to(dtype))
    fused = bnfast.fuse(model)
    assert len(bnfast.fusion_report(fused).fused) == 1
    found = fused(data().to(dtype))
    assert found.dtype == expected.dtype == (dtype if keep_dtype or dtype == torch.float64 else torch.float32)
    assert_close(found, expected)
