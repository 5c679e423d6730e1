"""functional.batch_norm is torch.nn.functional.batch_norm: torch's own samples, any layout of inputs and of
gradients, every subset of gradients, autocast, grad mode. On the kernels (interpreted) and on plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

from bnfast.functional import batch_norm
from tests.support import kernel_calls
from tests.support.buffers import bit_identical

every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# dx is a difference of larger numbers, hence an absolute tolerance some ulp above assert_close's
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def parameters(channels: int) -> dict[str, Tensor]:
    weight, bias, mean, variance = (data(channels, seed=n) for n in (1, 2, 3, 4))
    buffers = {"running_mean": mean, "running_var": variance.square() + 0.5}
    return {**buffers, "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def outcome(
    function: Callable[..., Tensor],
    x: Tensor,
    training: bool,
    arrange: Callable[[Tensor], Tensor] = lambda x: x,
    finish: Callable[[Tensor], Tensor] = lambda y: (y * data(*y.shape, seed=5)).sum(),
) -> dict[str, Tensor | None]:
    """Output, statistics and gradients of finish(function(arrange(x)))."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    given = parameters(arrange(leaf).shape[1])
    y = function(arrange(leaf), **given, training=training)
    finish(y).backward()
    named = {"y": y.detach(), "dx": leaf.grad, "dweight": given["weight"].grad, "dbias": given["bias"].grad}
    return {**named, "running_mean": given["running_mean"], "running_var": given["running_var"]}


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], **options: Any) -> None:
    for key, expected in theirs.items():
        assert_close(ours[key], expected, msg=lambda m, key=key: f"{key}: {m}", **{**CLOSE, **options})


def described(sample: Any) -> str:
    given = ["stats" if sample.args[0] is not None else "", "weight" if sample.args[2] is not None else ""]
    options = [f"{k}={v}" for k, v in sample.kwargs.items() if k != "cudnn_enabled"]
    return " ".join(filter(None, ["x".join(map(str, sample.input.shape)), *given, *options]))


(OP,) = (op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
SAMPLES = list(OP.sample_inputs("cpu", torch.float32, requires_grad=True))


@every_path
@pytest.mark.parametrize("sample", SAMPLES, ids=described)
def test_torch_op_info(sample: Any, path: str) -> None:
    """Negative momentum, momentum 0, an empty 1-D input, statistics without parameters, neither."""

    def results(function: Callable[..., Tensor]) -> list[Tensor | None]:
        x, mean, variance, weight, bias = (
            None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
            for t in (sample.input, *sample.args)
        )
        y = function(x, mean, variance, weight, bias, **sample.kwargs)
        y.backward(data(*y.shape, seed=1))
        grads = [t.grad if t is not None else None for t in (x, weight, bias)]
        return [y.detach(), mean, variance, *grads]

    for ours, theirs in zip(results(batch_norm), results(F.batch_norm), strict=True):
        assert_close(ours, theirs, **CLOSE)


INPUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((4, 3, 2, 5), lambda x: x.transpose(0, 1)),
    "height and width swapped": ((3, 4, 2, 5), lambda x: x.transpose(2, 3)),
    "2-D transposed": ((4, 7), torch.t),
    "unaligned": ((1 + 3 * 4 * 3 * 3,), lambda x: x[1:].view(3, 4, 3, 3)),
    "unaligned channels_last": ((1 + 3 * 3 * 3 * 4,), lambda x: x[1:].view(3, 3, 3, 4).permute(0, 3, 1, 2)),
    "channels sliced": ((3, 6, 2, 3), lambda x: x[:, 1:5]),
    "strided": ((3, 4, 6, 3), lambda x: x[:, :, ::2]),
    "expanded over N": ((1, 4, 2, 3), lambda x: x.expand(3, 4, 2, 3)),
    "expanded over C": ((3, 1, 2, 3), lambda x: x.expand(3, 4, 2, 3)),
    "flipped 3-D": ((3, 4, 5), lambda x: x.flip(0).transpose(1, 2)),
    "5-D permuted": ((2, 2, 3, 2, 3), lambda x: x.permute(1, 2, 0, 4, 3)),
}


@both_modes
@pytest.mark.parametrize(("shape", "arrange"), INPUTS.values(), ids=INPUTS.keys())
def test_input_of_any_strides(shape: tuple[int, ...], arrange: Any, training: bool) -> None:
    x = data(*shape)
    ours, theirs = (outcome(f, x, training, arrange) for f in (batch_norm, F.batch_norm))
    assert_same(ours, theirs)
    assert ours["y"].is_contiguous() or ours["y"].is_contiguous(memory_format=torch.channels_last)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded to all": torch.sum,
    "expanded over N": lambda y: (y.sum(0) * data(*y.shape[1:], seed=5)).sum(),
    "expanded over a plane": lambda y: (y.mean((2, 3)) * data(*y.shape[:2], seed=5)).sum(),
    "sliced": lambda y: (torch.cat([y, y[:, :1]], 1) * data(y.shape[0], y.shape[1] + 1, *y.shape[2:])).sum(),
    "transposed": lambda y: (y.transpose(0, 1) * data(y.shape[1], y.shape[0], *y.shape[2:], seed=5)).sum(),
    "plane transposed": lambda y: (y.transpose(2, 3) * data(*y.transpose(2, 3).shape, seed=5)).sum(),
    "contiguous": lambda y: (y.contiguous() * data(*y.shape, seed=5)).sum(),
    "channels_last": lambda y: (
        y.contiguous(memory_format=torch.channels_last)
        * data(*y.shape, seed=5).contiguous(memory_format=torch.channels_last)
    ).sum(),
    "unaligned": lambda y: (F.pad(y.flatten(), (1, 0)) * data(y.numel() + 1, seed=5)).sum(),
}


@both_modes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("finish", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradient_of_any_strides(finish: Any, layout: torch.memory_format, training: bool) -> None:
    """Gradients come as their producers leave them: expanded, sliced, transposed, of the other layout."""
    x = data(3, 4, 2, 3).contiguous(memory_format=layout)
    given = parameters(4)
    y = batch_norm(x.requires_grad_(), **given, training=training)
    seen: list[tuple[int, ...]] = []
    y.register_hook(lambda dy: seen.append(dy.stride()))
    finish(y).backward()
    ours = {"dx": x.grad, "dweight": given["weight"].grad, "dbias": given["bias"].grad}
    # torch in fp64, with a dense gradient: torch's own treatment of strides is not what is asked here
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in {"x": x, **given}.items()}
    exact["running_mean"], exact["running_var"] = (v.double() for v in list(parameters(4).values())[:2])
    z = F.batch_norm(exact.pop("x"), **exact, training=training)
    leaf = z.detach().requires_grad_()
    finish(leaf).backward()
    assert len(seen) == 1
    assert ours["dx"].stride() == x.stride()
    inputs = [z.grad_fn.next_functions[0][0].variable, exact["weight"], exact["bias"]]
    for mine, true in zip(ours.values(), torch.autograd.grad(z, inputs, leaf.grad.contiguous()), strict=True):
        assert_close(mine, true.float(), **CLOSE)


FORMATS = [
    ((3, 4, 2, 3), torch.channels_last),
    ((1, 4, 2, 3), torch.channels_last),
    ((3, 1, 2, 3), torch.channels_last),
    ((3, 4, 1, 1), torch.channels_last),
    ((3, 4, 1, 3), torch.channels_last),
    ((1, 1, 2, 3), torch.channels_last),
    ((2, 3, 2, 1, 2), torch.channels_last_3d),
    ((1, 3, 2, 2, 2), torch.channels_last_3d),
    ((2, 1, 2, 2, 2), torch.channels_last_3d),
    ((2, 3, 1, 1, 1), torch.channels_last_3d),
]


@both_modes
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "form"), FORMATS, ids=str)
def test_memory_format_in_is_memory_format_out(
    shape: tuple[int, ...], form: torch.memory_format, last: bool, training: bool
) -> None:
    """Also where both formats describe the tensor and only the strides of its 1s tell them apart: there torch
    gives contiguous ones."""
    x = torch.empty(shape, memory_format=form if last else torch.contiguous_format).copy_(data(*shape))
    ours, theirs = (outcome(f, x, training) for f in (batch_norm, F.batch_norm))
    assert_same(ours, theirs)
    assert ours["y"].stride() == ours["dx"].stride() == theirs["y"].stride()
    if shape[1] > 1 and x[0, 0].numel() > 1:
        assert theirs["y"].stride() == theirs["dx"].stride() == x.stride()


SUBSETS = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c]


@both_modes
@pytest.mark.parametrize(
    "wanted", SUBSETS, ids=lambda s: "+".join(n for n, w in zip("xwb", s, strict=True) if w)
)
def test_only_the_gradients_needed(wanted: tuple[bool, bool, bool], training: bool) -> None:
    """A frozen parameter costs nothing: its gradient is not computed, and the others are what they were."""
    results = []
    with kernel_calls.gradients_asked_for("batch") as asked:
        for function in (batch_norm, F.batch_norm):
            given = {"input": data(3, 4, 2, 3), **parameters(4)}
            leaves = [given["input"], given["weight"], given["bias"]]
            for leaf, need in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(need)
            function(**given, training=training).backward(data(3, 4, 2, 3, seed=5))
            results.append([leaf.grad for leaf in leaves])
    assert_close(*results, **CLOSE)
    assert asked == [wanted]


@both_modes
@every_path
def test_without_running_statistics_the_input_is_untouched(path: str, training: bool) -> None:
    """A Triton library wrote its statistics over the input's first C elements when there were no buffers."""
    x = data(3, 4, 2, 3)
    given = parameters(4) if not training else {}
    before = x.clone()
    y = batch_norm(x, given.get("running_mean"), given.get("running_var"), training=training)
    assert bit_identical(x, before)
    assert_close(y, F.batch_norm(x, given.get("running_mean"), given.get("running_var"), training=training))


@every_path
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@both_modes
def test_grad_mode_off(training: bool, guard: Any, path: str) -> None:
    x = data(3, 4, 2, 3).requires_grad_()
    results = []
    for function in (batch_norm, F.batch_norm):
        given = parameters(4)
        with guard():
            results.append(
                (function(x, **given, training=training), given["running_mean"], given["running_var"])
            )
    assert not results[0][0].requires_grad
    assert results[0][0].is_inference() == results[1][0].is_inference()
    assert_close(*results)


@every_path
@both_modes
def test_autocast(training: bool, path: str) -> None:
    """A convolution hands on bf16; parameters and statistics stay fp32, and so do their gradients."""
    kernel = data(4, 2, 1, 1, seed=7)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            outcome(f, data(3, 2, 3, 3), training, lambda x: F.conv2d(x, kernel))
            for f in (batch_norm, F.batch_norm)
        )
    assert ours["y"].dtype == torch.bfloat16
    assert ours["dweight"].dtype == ours["running_mean"].dtype == torch.float32
    assert_same(ours, theirs, rtol=2e-2, atol=5e-2)


@both_modes
def test_one_graph_twice(training: bool) -> None:
    """The second pass finds everything as the first did, down to the bits."""
    x, given = data(3, 4, 2, 3).requires_grad_(), parameters(4)
    y = batch_norm(x, **given, training=training)
    dy = data(3, 4, 2, 3, seed=5)
    first, second = (
        torch.autograd.grad(y, (x, given["weight"], given["bias"]), dy, retain_graph=True) for _ in range(2)
    )
    assert all(bit_identical(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(y, x, dy)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)


def test_output_may_be_overwritten() -> None:
    """ReLU in place, the usual thing after a BatchNorm: backward keeps x, not y."""
    x = data(3, 4, 2, 3)
    ours, theirs = (
        outcome(lambda x, f=f, **given: F.relu(f(x, **given), inplace=True), x, True)
        for f in (batch_norm, F.batch_norm)
    )
    assert_same(ours, theirs)
