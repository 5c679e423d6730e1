"""act(norm(x) + z) in one go, against fp64, and what it keeps for its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.functional import batch_norm, batch_renorm
from bnfast.kernels.epilogue import NAMES
from tests.support.buffers import bit_identical, nan_filled_allocations
from tests.support.fused_cases import LAYERS, Named, check, given, ours, run, theirs
from tests.support.layers import every_path

every_layer = pytest.mark.parametrize("layer", LAYERS)
LAYOUTS = ("contiguous", "channels_last")
# both addressings and what does not fit them: odd channels, odd planes, runs in pieces, a value a channel
SHAPES = {
    "nchw_packed": (6, 16, 4, 6),
    "7x7": (2, 16, 7, 7),
    "odd": (3, 12, 5, 3),
    "nchw": (1, 4, 64, 66),
    "rows": (24, 40),
    "3-D": (2, 8, 3, 4, 5),
}


def passes(
    shape: tuple[int, ...], dtype: torch.dtype, layer: str, layout: str, activation: Any, z: bool
) -> None:
    g = given(shape, dtype, layer, layout, z)
    before = {name: t.clone() for name, t in g.items()}
    with nan_filled_allocations():
        found = run(ours(layer, activation), g)
    assert all(bit_identical(g[name], before[name]) for name in g)
    check(layer, activation, g, found)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", NAMES, ids=str)
def test_every_activation(activation: Any, residual: bool) -> None:
    for layer in ("train", "group"):
        passes((3, 8, 2, 4), torch.float32, layer, "contiguous", activation, residual)


@every_path
@pytest.mark.parametrize("activation", ["relu", "silu", ("leaky_relu", 0.2), None], ids=str)
@every_layer
def test_every_layer(layer: str, activation: Any, path: str) -> None:
    for residual in (False, True):
        passes((3, 8, 2, 4), torch.float32, layer, "channels_last", activation, residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("layer", ["train", "group", "layer"])
def test_every_way_through_memory(layer: str, shape: tuple[int, ...], layout: str) -> None:
    """With signs where sizes allow them, in bf16 and in fp32, and with z where they do not."""
    for dtype in (torch.bfloat16, torch.float32):
        passes(shape, dtype, layer, layout, "relu", True)
    passes(shape, torch.bfloat16, layer, layout, "silu", True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@every_layer
def test_other_dtypes(layer: str, residual: bool, dtype: torch.dtype) -> None:
    passes(SHAPES["nchw_packed"], dtype, layer, "channels_last", "relu", residual)


@every_path
@pytest.mark.parametrize("activation", ["silu", "relu"])
@every_layer
def test_gradients_of_all_orders(layer: str, activation: Any, path: str) -> None:
    g = given((2, 4, 2, 1) if layer != "layer" else (2, 2, 2), torch.float64, layer)
    leaves = [g[name].requires_grad_() for name in ("x", "weight", "bias", "z")]
    function = ours(layer, activation)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@every_layer
def test_any_strides(layer: str) -> None:
    """Residuals and gradients that are transposed, sliced or expanded."""
    g = given((6, 16, 4, 6), torch.float32, layer, "channels_last")
    expected = run(ours(layer, "relu"), g)
    contiguous = {**g, "z": g["z"].contiguous(), "dy": g["dy"].contiguous()}
    sliced = {
        **g,
        "z": torch.cat((g["z"], g["z"]), 1)[:, :16],
        "dy": g["dy"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    for other in (contiguous, sliced):
        found = run(ours(layer, "relu"), other)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, check_stride=False)
    one = {
        **g,
        "z": g["z"][:1, :1, :1, :1].expand(g["x"].shape),
        "dy": g["dy"][:1, :1, :1, :1].expand(g["x"].shape),
    }
    check_values(layer, one)


def check_values(layer: str, g: Named) -> None:
    found, expected = run(ours(layer, "silu"), g), run(theirs(layer, "silu"), g)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@every_layer
@pytest.mark.parametrize("wanted", ["x", "weight", "z", "bias z", "x z"])
def test_only_what_is_needed(layer: str, wanted: str) -> None:
    g = given((6, 16, 4, 6), torch.float32, layer)
    expected = run(ours(layer, "relu"), g)
    for name, t in g.items():
        t.requires_grad_(name in wanted.split())
    y = ours(layer, "relu")(g["x"], g["weight"], g["bias"], g["z"])
    y.backward(g["dy"])
    for name in ("x", "weight", "bias", "z"):
        assert (g[name].grad is not None) == (name in wanted.split())
        if g[name].grad is not None:
            torch.testing.assert_close(g[name].grad, expected[f"d{name}"], rtol=1e-5, atol=1e-5)


def saved_bytes(function: Any, leaves: tuple[Tensor, ...]) -> dict[int, int]:
    """Of each storage that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*leaves)
    return kept


@pytest.mark.parametrize("layer", ["train", "eval", "group", "instance"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bit_for_each_element_is_kept(layer: str, layout: str) -> None:
    """Of relu with a residual: x, the statistics, the parameters, and T / 16 of signs; never z or y."""
    g = given((8, 16, 8, 8), torch.bfloat16, layer, layout)
    leaves = tuple(g[name].requires_grad_() for name in ("x", "weight", "bias", "z"))
    size = g["x"].nbytes
    kept = saved_bytes(ours(layer, "relu"), leaves)
    assert g["z"].untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) <= size + size // 16 + 4096
    others = saved_bytes(ours(layer, "silu"), leaves)
    assert g["z"].untyped_storage().data_ptr() in others, "silu's slope needs z again"
    alone = saved_bytes(lambda x, w, b: ours(layer, "relu")(x, w, b), leaves[:3])
    assert sum(alone.values()) <= size + 4096


@pytest.mark.parametrize("back", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_signs_survive_hooks_that_reorder_memory(layout: str, back: torch.memory_format) -> None:
    g = given((6, 16, 4, 6), torch.float32, "train", layout)
    expected = run(ours("train", "relu"), g)

    def unpack(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=back) if t.dim() == 4 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
        found = run(ours("train", "relu"), g)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, check_stride=False)


@every_path
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_batch_renorm(activation: str, path: str) -> None:
    """With r and d at work, and in eval."""
    g = given((6, 16, 4, 6), torch.float64, "train")
    mean, variance = torch.full((16,), 0.3, dtype=torch.float64), torch.full((16,), 1.7, dtype=torch.float64)
    for training in (True, False):

        def ours_(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
            state = (mean.clone(), variance.clone(), weight, bias, training)  # noqa: B023
            return batch_renorm(x, *state, r_max=1.1, d_max=0.2, activation=activation, residual=z)

        def apart(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor) -> Tensor:
            state = (mean.clone(), variance.clone(), weight, bias, training)  # noqa: B023
            return getattr(torch.nn.functional, activation)(batch_renorm(x, *state, r_max=1.1, d_max=0.2) + z)

        found, expected = run(ours_, g), run(apart, g)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


@every_path
def test_empty_batches_and_inference_mode(path: str) -> None:
    layer = bnfast.GroupNorm(2, 4, activation="relu")
    assert layer(torch.randn(0, 4, 3), residual=torch.randn(0, 4, 3)).shape == (0, 4, 3)
    x = torch.randn(2, 4, 3)
    with torch.inference_mode():
        y = layer(x, residual=x)
    torch.testing.assert_close(y, torch.relu(bnfast.GroupNorm(2, 4)(x) + x))
    z = torch.randn(3, 2, 4, 3)
    vmapped = torch.vmap(lambda x, z: batch_norm(x, None, None, training=True, activation="relu", residual=z))
    torch.testing.assert_close(
        vmapped(z, z)[0], torch.relu(batch_norm(z[0], None, None, training=True) + z[0])
    )
