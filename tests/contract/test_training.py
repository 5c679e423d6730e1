"""Every layer trains and evaluates as its twin does: torch.nn's layer, or the formulas where there is none.
Outputs, gradients, state, and how they lie in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map_only

from bnfast import functional
from tests.support.alike import same_error
from tests.support.buffers import bit_identical
from tests.support.layers import (
    BY_NAME,
    CLOSE,
    LAYERS,
    Function,
    Layer,
    Options,
    assert_same,
    both_modes,
    data,
    drop_ins,
    every_layer,
    every_path,
    step,
)

CASES = [
    pytest.param(layer, options, last, id=f"{layer}-{options}-{'channels_last' if last else 'contiguous'}")
    for layer in LAYERS
    for options in layer.options
    for last in ((False, True) if layer.keeps_format and len(layer.shape) > 3 else (False,))
]


@every_path
@pytest.mark.parametrize(("layer", "options", "last"), CASES)
def test_trains_and_evaluates_like_its_twin(
    layer: Layer, options: Options, last: bool, path: str, launches: list[Any]
) -> None:
    """Two steps of training and one of evaluation."""
    ours, theirs = layer.pair(**options)
    if layer.drop_in:
        assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for seed in range(3):
        if seed == 2:
            ours.eval(), theirs.eval()
        x = layer.input(seed, options.get("dtype", torch.float32), last)
        found = step(ours, x)
        assert_same(found, step(theirs, x))
        if layer.keeps_format:
            assert found["y"].stride() == found["dx"].stride() == x.stride()
    assert bool(launches) == (path == "kernels")
    assert all(buffer.grad is None for buffer in ours.buffers())


def of_modules() -> list[Any]:
    """torch's own samples of its layers, an empty batch among them."""
    found = []
    for info in module_db:
        name = info.module_cls.__name__
        for training in (True, False) if name in BY_NAME and hasattr(nn, name) else ():
            options: Any = {"device": "cpu", "dtype": torch.float32, "requires_grad": True}
            for sample in info.module_inputs_func(info, training=training, **options):
                mode = "train" if training else "eval"
                of_it = pytest.param(name, sample, training, id=f"{name}-{sample.desc or 'default'}-{mode}")
                found.append(of_it)
    return found


@every_path
@pytest.mark.parametrize(("name", "sample", "training"), of_modules())
def test_torchs_samples_of_layers(
    name: str, sample: Any, training: bool, path: str, launches: list[Any]
) -> None:
    built = sample.constructor_input
    layer = replace(BY_NAME[name], arguments=built.args)
    ours, theirs = (module.train(training) for module in layer.pair(**built.kwargs))
    (x,) = sample.forward_input.args
    assert repr(ours) == repr(theirs)
    # dx is a difference of larger numbers, hence an absolute tolerance some units above assert_close's
    assert_same(step(ours, x), step(theirs, x), rtol=1e-5, atol=3e-5)
    assert bool(launches) == (path == "kernels" and x.numel() > 0)


def of_functions() -> list[Any]:
    """torch's own samples of its functions: a momentum of 0 or below, empty inputs, parameters left out."""
    found = []
    for op in op_db:
        name = op.name.removeprefix("nn.functional.")
        if name in ("batch_norm", "group_norm", "instance_norm", "layer_norm") and not op.variant_test_name:
            samples = op.sample_inputs("cpu", torch.float32, requires_grad=True)
            found += [pytest.param(name, sample, id=f"{name}-{n}") for n, sample in enumerate(samples)]
    return found


@every_path
@pytest.mark.parametrize(("name", "sample"), of_functions())
def test_torchs_samples_of_functions(name: str, sample: Any, path: str) -> None:
    def results(function: Function) -> list[Tensor | None]:
        leaves: list[Tensor] = []

        def leaf(t: Tensor) -> Tensor:
            leaves.append(t.detach().clone().requires_grad_(t.requires_grad))
            return leaves[-1]

        x, args, kwargs = tree_map_only(Tensor, leaf, (sample.input, sample.args, sample.kwargs))
        y = function(x, *args, **kwargs)
        y.backward(data(*y.shape, seed=1))
        return [y.detach(), *(t.detach() for t in leaves), *(t.grad for t in leaves)]

    # rows of one value have no gradient, but torch's is a rounding error times 1 / sqrt(eps)
    one = name == "layer_norm" and sample.input.shape[-1] == 1
    ours, theirs = (results(getattr(library, name)) for library in (functional, F))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-3 if one else 3e-5)


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@every_layer
def test_half_input_keeps_its_dtype(layer: Layer, dtype: torch.dtype, autocast: bool, path: str) -> None:
    """Beside fp32 parameters and statistics, which stay so and have gradients of their own dtype."""
    if layer.name == "FrozenBatchNorm2d":
        pytest.skip("the output has the wider dtype: see test_frozen.py")
    ours, theirs = layer.pair(**(layer.tracks or {}))
    x = layer.input().to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = step(ours, x)
    expected = step(theirs, x.float())
    assert found["y"].dtype == found["dx"].dtype == dtype
    assert {name: t.dtype for name, t in found.items() if name not in ("y", "dx")} == {
        name: t.dtype for name, t in expected.items() if name not in ("y", "dx")
    }
    assert_same(found, expected, rtol=2e-2, atol=5e-2, check_dtype=False)
    for name in set(found) & {"running_mean", "running_var"}:
        coarse = {} if path == "kernels" or layer.name.startswith("Batch") else {"rtol": 1e-2, "atol": 1e-2}
        assert_close(found[name], expected[name], **(coarse or CLOSE))


@drop_ins
def test_half_layers_take_float_input(layer: Layer, launches: list[Any]) -> None:
    """The kernels compute in fp32 whatever the parameters and statistics are; .half() makes these fp16."""
    ours, theirs = layer.pair(**(layer.tracks or {}))
    found, expected = step(ours.half(), layer.input()), step(theirs, layer.input())
    assert launches
    assert found["y"].dtype == torch.float32
    assert all(t.dtype == torch.float16 for n, t in found.items() if n.startswith(("dw", "db", "running")))
    assert_same(found, expected, rtol=2e-3, atol=2e-3, check_dtype=False)


@every_path
@both_modes
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@every_layer
def test_grad_mode_off(layer: Layer, guard: Any, training: bool, path: str) -> None:
    x, results = layer.input(), []
    for module in layer.pair(**(layer.tracks or {})):
        with guard():
            y = module.train(training)(x.requires_grad_())
        assert not y.requires_grad
        results.append([y.is_inference(), y.clone(), {n: t.clone() for n, t in module.state_dict().items()}])
    assert_close(*results, **CLOSE)


@every_path
@both_modes
@every_layer
def test_an_empty_batch(layer: Layer, training: bool, path: str, launches: list[Any]) -> None:
    """The last of a filtered data set: statistics stay, the batch is counted, gradients are zeros."""
    x = torch.empty(0, *layer.shape[1:])
    ours, theirs = (module.train(training) for module in layer.pair())
    found, expected = step(ours, x), step(theirs, x)
    assert_same(found, expected, rtol=0, atol=0, equal_nan=True)
    assert not launches
    assert all(bool(t.isfinite().all()) for t in found.values())


@every_path
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}], ids=str)
@both_modes
def test_a_batch_norm_of_empty_planes(
    options: Options, training: bool, path: str, launches: list[Any]
) -> None:
    ours, theirs = (m.train(training) for m in BY_NAME["BatchNorm2d"].pair(**options))
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        assert_same(step(ours, torch.empty(shape)), step(theirs, torch.empty(shape)), rtol=0, atol=0)
    assert not launches


@every_path
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)], ids=str)
def test_a_layer_norm_of_empty_rows(shape: tuple[int, ...], path: str) -> None:
    ours, theirs = replace(BY_NAME["LayerNorm"], arguments=(shape[-1],)).pair()
    found, expected = step(ours, torch.ones(shape)), step(theirs, torch.ones(shape))
    assert all(bit_identical(found[name], expected[name]) for name in expected)


@every_path
@pytest.mark.parametrize("shape", [(2, 4, 0), (2, 0, 3)], ids=["no positions", "no channels"])
def test_a_group_norm_of_samples_without_values(shape: tuple[int, ...], path: str) -> None:
    """Since torch 2.14 an error, before an empty result."""
    try:
        expected = F.group_norm(data(*shape), 2)
    except RuntimeError:
        same_error(lambda: functional.group_norm(data(*shape), 2), lambda: F.group_norm(data(*shape), 2))
    else:
        assert_close(functional.group_norm(data(*shape), 2), expected)


@every_path
@pytest.mark.parametrize("dims", ["1d", "2d", "3d"])
def test_an_instance_norm_of_one_sample_and_of_other_channels(dims: str, path: str) -> None:
    layer = BY_NAME[f"InstanceNorm{dims}"]
    x = data(*layer.shape[1:])
    for options in ({}, {"affine": True, "track_running_stats": True}):
        ours, theirs = layer.pair(**options)
        assert_same(step(ours, x), step(theirs, x))
    ours, theirs = (kind(5) for kind in (layer.ours, layer.theirs))
    with pytest.warns(UserWarning, match="does not match num_features"):
        y = ours(x)
    with pytest.warns(UserWarning, match="does not match num_features"):
        assert_close(y, theirs(x), **CLOSE)
    for kind in (layer.ours, layer.theirs):
        with pytest.raises(ValueError, match="match num_features"):
            kind(5, affine=True)(x)
        with pytest.raises(ValueError, match="expected"):
            kind(4)(data(4))


@every_path
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instance_norms_running_statistics(dtype: torch.dtype, kind: torch.dtype, path: str) -> None:
    """The samples' average of mean and unbiased variance, also where the variance is far below eps."""
    x = (data(3, 4, 6, 6) * 1e-4).to(dtype)
    mean, variance = torch.full((4,), 0.25, dtype=kind), torch.full((4,), 1e-8, dtype=kind)
    functional.instance_norm(x, mean, variance, momentum=0.75)
    wide = x.double()
    # in plain torch, its own rounding
    coarse = kind == torch.float16 or (path == "torch" and dtype != torch.float32)
    close = {"rtol": 2e-3, "atol": 6e-8} if coarse else {"rtol": 1e-5, "atol": 0.0}
    assert_close(mean.double(), 0.0625 + 0.75 * wide.mean((2, 3)).mean(0), **close)
    if not coarse:  # of which 1e-8 is no number in fp16
        assert_close(variance.double(), 0.25e-8 + 0.75 * wide.var((2, 3)).mean(0), rtol=1e-4, atol=0)
