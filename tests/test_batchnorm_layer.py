"""What single BatchNorms have beside the contract: `affine`, which tells who reads it; what Batch
Renormalization refuses; and the keys and dtypes of torchvision's and detectron2's frozen layers."""

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
from tests.support.convertible import DetectronFrozen, TorchvisionFrozen
from tests.support.layers import BY_NAME, DTYPES, assert_same, data, every_path
from tests.support.versions import TORCH

X = data(4, 3, 2, 2)
IMAGES = data(3, 4, 5, 6, dtype=torch.float64)


def test_version_1_checkpoint_loads_strictly() -> None:
    """Checkpoints from before torch 0.4.1 know no num_batches_tracked."""
    layer = BY_NAME["BatchNorm2d"]
    ours, theirs = layer.pair()
    new = theirs.state_dict()
    new.pop("num_batches_tracked")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(new, strict=True)
    new._metadata[""]["version"] = 1
    ours.num_batches_tracked.fill_(3)
    ours.load_state_dict(new, strict=True)
    assert ours.num_batches_tracked == 3  # torch's rule: what the file lacks stays as it is


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


def test_gradients_of_batch_renorms_formulas() -> None:
    """create_graph=True runs the formulas in the kernels' place."""
    sizes = ((4, 3, 2, 2), (3,), (3,))
    leaves = [data(*size, seed=n, dtype=torch.float64).requires_grad_() for n, size in enumerate(sizes)]
    x, weight, bias = leaves
    y = batch_renorm(x, torch.zeros(3), torch.ones(3) / 2, weight, bias, training=True, activation="silu")
    graph, plain = (torch.autograd.grad(y, leaves, x.cos(), create_graph=create) for create in (True, False))
    assert_close(graph, plain)


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


# FrozenBatchNorm2d


@pytest.mark.parametrize("kind", [TorchvisionFrozen, DetectronFrozen])
def test_same_keys_as_theirs(kind: type[nn.Module]) -> None:
    ours, theirs = bnfast.FrozenBatchNorm2d(4), kind(4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(IMAGES.float()), theirs(IMAGES.float()))
    theirs.load_state_dict(bnfast.FrozenBatchNorm2d(4).state_dict())
    # For another version, detectron2's older releases change running_var where they find a lower one.
    assert ours.state_dict()._metadata[""]["version"] == DetectronFrozen._version


def test_a_new_one_changes_almost_nothing() -> None:
    layer = bnfast.FrozenBatchNorm2d(4, eps=0.0, dtype=torch.float64)
    assert_close(layer(IMAGES), IMAGES, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"keep_dtype": True}], ids=str)
def test_its_arguments_are_shown(options: dict[str, Any]) -> None:
    shown = "".join(f", {name}={value}" for name, value in options.items())
    assert repr(bnfast.FrozenBatchNorm2d(4, **options)) == f"FrozenBatchNorm2d(4, eps=1e-05{shown})"


def test_loads_a_batchnorm_strictly() -> None:
    """Its counter is dropped, from the model's own state_dict at no time; other keys still count."""
    batch_norm = BY_NAME["BatchNorm2d"].pair(dtype=torch.float64)[1]
    batch_norm(IMAGES * 2 + 1)
    source, model = nn.Sequential(batch_norm), nn.Sequential(bnfast.FrozenBatchNorm2d(4, dtype=torch.float64))
    state = source.state_dict()
    assert model.load_state_dict(state) == ([], [])
    assert_close(model(IMAGES), source.eval()(IMAGES))
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
    x = IMAGES.to(dtype, copy=True).requires_grad_()
    z = IMAGES.to(dtype) if added else torch.zeros((), dtype=dtype)
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
    x = IMAGES.bfloat16()
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
    found, expected = (m(IMAGES.to(dtype)) for m in (fused, model))
    assert found.dtype == expected.dtype == (dtype if keep_dtype or dtype == torch.float64 else torch.float32)
    assert_close(found, expected)
