"""functional.layer_norm and the layer are torch.nn's: torch's own samples, any strides, every subset of
gradients, autocast, derivatives of every order, graphs, copies, misuse. On the kernels (interpreted) and on
plain torch. The kernels' numbers are in test_layernorm.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import bnfast
from bnfast.functional import layer_norm
from bnfast.reference import layernorm as reference
from tests.support import kernel_calls
from tests.support.alike import same_error
from tests.support.buffers import bit_identical

OPERATORS = torch.ops.bnfast
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
Function = Callable[..., Tensor]


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


def pair(*args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch.nn's) with the same random parameters."""
    ours, theirs = bnfast.LayerNorm(*args, **options), nn.LayerNorm(*args, **options)
    with torch.no_grad():
        for seed, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            b.copy_(a.copy_(data(*a.shape, seed=seed)))
    return ours, theirs


def step(run: Function, module: nn.Module, x: Tensor) -> dict[str, Any]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = run(x)
    y.backward(data(*y.shape, seed=9).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, **{f"d{n}": p.grad for n, p in module.named_parameters()}}


(OP,) = (op for op in op_db if op.name == "nn.functional.layer_norm" and not op.variant_test_name)


@every_path
@pytest.mark.parametrize("sample", list(OP.sample_inputs("cpu", torch.float32, requires_grad=True)), ids=repr)
def test_torch_op_info(sample: Any, path: str) -> None:
    def results(function: Function) -> list[Tensor | None]:
        given = [t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in sample.args]
        x = sample.input.detach().clone().requires_grad_()
        y = function(x, *given, **sample.kwargs)
        y.backward(data(*y.shape, seed=1))
        return [y.detach(), x.grad, *(t.grad for t in given if isinstance(t, Tensor))]

    # rows of one value have no gradient, but torch's is a rounding error times 1 / sqrt(eps)
    one = sample.input.shape[-1] == 1
    assert_close(results(layer_norm), results(F.layer_norm), rtol=1e-5, atol=1e-3 if one else 2e-5)


(INFO,) = (info for info in module_db if info.module_cls is nn.LayerNorm)
SAMPLES = INFO.module_inputs_func(
    INFO, device="cpu", dtype=torch.float32, requires_grad=True, training=True
)  # fmt: skip


@every_path
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.desc or "default")
def test_torch_module_info(sample: Any, path: str, launches: list[Any]) -> None:
    built = sample.constructor_input
    ours, theirs = pair(*built.args, **built.kwargs)
    (x,) = sample.forward_input.args
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(step(ours, ours, x), step(theirs, theirs, x), **CLOSE)
    assert bool(launches) == (path == "kernels" and x.numel() > 0)


ARRANGED: dict[str, Function] = {
    "transposed": lambda t: t.transpose(0, 1),
    "sliced": lambda t: t[:, 1:3],
    "unaligned": lambda t: t.flatten()[1:37].view(3, 3, 4),
    "expanded": lambda t: t[:, :1].expand(4, 5, 6),
    "channels_last": lambda t: t.view(2, 5, 2, 6).contiguous(memory_format=torch.channels_last),
    "rows strided": lambda t: t[:, :, ::2],
}


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED.keys())
def test_input_of_any_strides(arrange: Function) -> None:
    def results(function: Function) -> tuple[Tensor, Tensor]:
        x = data(4, 5, 6).requires_grad_()
        y = function(arrange(x), arrange(x).shape[-1:])
        y.backward(data(*y.shape, seed=1))
        return y, x.grad

    ours, theirs = results(layer_norm), results(F.layer_norm)
    assert_close(ours, theirs, **CLOSE)
    assert ours[0].stride() == theirs[0].stride()


FINISHED: dict[str, Function] = {
    "expanded to all": torch.sum,
    "expanded over rows": lambda y: (y.sum(0) * data(*y.shape[1:], seed=5)).sum(),
    "sliced": lambda y: (torch.cat([y, y], 2) * data(4, 5, 12, seed=5)).sum(),
    "transposed": lambda y: (y.transpose(0, 2) * data(6, 5, 4, seed=5)).sum(),
    "unaligned": lambda y: (F.pad(y.flatten(), (1, 0)) * data(y.numel() + 1, seed=5)).sum(),
}


@pytest.mark.parametrize("finish", FINISHED.values(), ids=FINISHED.keys())
def test_gradient_of_any_strides(finish: Function) -> None:
    ours, theirs = pair(6)
    assert_close(*(step(lambda x, m=m: finish(m(x)), m, data(4, 5, 6)) for m in (ours, theirs)), **CLOSE)


SUBSETS = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c]


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_only_the_gradients_needed(wanted: tuple[bool, bool, bool]) -> None:
    results = []
    with kernel_calls.gradients_asked_for("layer") as asked:
        for function in (layer_norm, F.layer_norm):
            leaves = [data(5, 6), data(6, seed=1), data(6, seed=2)]
            for leaf, need in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(need)
            function(leaves[0], (6,), *leaves[1:]).backward(data(5, 6, seed=5))
            results.append([leaf.grad for leaf in leaves])
    assert_close(*results, **CLOSE)
    assert asked == [wanted]


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_input_keeps_its_dtype(dtype: torch.dtype, autocast: bool, path: str) -> None:
    """With fp32 parameters, under autocast or not: bf16 in, bf16 out. Gradients have their leaves' dtypes."""
    ours, theirs = pair(8)
    x = data(5, 8, dtype=torch.float32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = step(ours, ours, x)
    assert [result[k].dtype for k in ("y", "dx", "dweight")] == [dtype, dtype, torch.float32]
    expected = step(theirs, theirs, x.float())
    assert_close(result, expected, rtol=2e-2, atol=5e-2, check_dtype=False)


@every_path
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_grad_mode_off(guard: Any, path: str) -> None:
    x, weight = data(3, 6).requires_grad_(), data(6, seed=1).requires_grad_()
    with guard():
        ours, theirs = layer_norm(x, (6,), weight), F.layer_norm(x, (6,), weight)
    assert not ours.requires_grad
    assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("affine", ["wb", "w", "b", ""])
@pytest.mark.parametrize("dims", [1, 2])
def test_gradcheck(dims: int, affine: str, launches: list[Any]) -> None:
    """First and second derivatives against finite differences; batched gradients against one by one."""
    shape = (2, 3)[-dims:]
    x = data(3, 2, 3, dtype=torch.float64).requires_grad_()
    parameters = [data(*shape, seed=n, dtype=torch.float64).requires_grad_() for n in range(len(affine))]

    def function(x: Tensor, *given: Tensor) -> Tensor:
        found = dict(zip(affine, given, strict=True))
        return layer_norm(x, shape, found.get("w"), found.get("b"), 1e-3)

    assert torch.autograd.gradcheck(function, (x, *parameters), check_batched_grad=True)
    assert launches
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True, check_batched_grad=True)


def test_reference_is_torch() -> None:
    x, weight, bias = (data(*s, dtype=torch.float64) for s in ((4, 2, 3), (2, 3), (2, 3)))
    assert_close(reference.layer_norm(x, weight, bias, 2, 1e-5), F.layer_norm(x, (2, 3), weight, bias))


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return data(*shape, seed=seed, dtype=torch.float64)


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda m: vmap(m)(doubles(3, 4, 2)),
    "vmap(grad)": lambda m: vmap(grad(lambda x: m(x).pow(3).sum()))(doubles(3, 4, 2)),
    "jvp": lambda m: jvp(m, (doubles(4, 2),), (doubles(4, 2, seed=1),)),
    "jacrev": lambda m: jacrev(m)(doubles(3, 2)),
    "hessian": lambda m: hessian(lambda x: m(x).pow(3).sum())(doubles(3, 2)),
    "hessian vectorize": lambda m: torch.autograd.functional.hessian(
        lambda x: m(x).pow(3).sum(), doubles(3, 2), vectorize=True
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_as_torch(transform: Any) -> None:
    ours, theirs = pair(2, dtype=torch.float64)
    assert_close(transform(ours), transform(theirs))


MISUSE: dict[str, tuple[Any, ...]] = {
    "no shape": (data(2, 4), ()),
    "an int": (data(2, 4), 4),
    "a float": (data(2, 4), (4.0,)),
    "another shape": (data(2, 4), (5,)),
    "more dimensions": (data(4), (2, 4)),
    "weight too long": (data(2, 4), (4,), data(5)),
    "bias too long": (data(2, 4), (4,), None, data(5)),
    "weight of one dimension": (data(2, 2, 4), (2, 4), data(8)),
    "weight elsewhere": (data(2, 4), (4,), data(4).to("meta")),
    "integers": (data(2, 4).long(), (4,)),
    "complex": (data(2, 4).to(torch.complex64), (4,)),
    "eps a string": (data(2, 4), (4,), None, None, "small"),
}


@every_path
@pytest.mark.parametrize("given", MISUSE.values(), ids=MISUSE.keys())
def test_misuse_raises_as_torch(given: tuple[Any, ...], path: str) -> None:
    same_error(lambda: layer_norm(*given), lambda: F.layer_norm(*given))


@every_path
@pytest.mark.parametrize("eps", [0.0, -1e-3, -10.0, 1, torch.tensor(1e-3)], ids=str)
def test_any_eps(eps: Any, path: str) -> None:
    """torch takes a negative one, and lets the root of a negative number be NaN."""
    ours, theirs = (f(data(3, 6), (6,), eps=eps) for f in (layer_norm, F.layer_norm))
    assert_close(ours, theirs, equal_nan=True)


@every_path
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...], path: str) -> None:
    ours, theirs = pair(shape[-1])
    mine, other = step(ours, ours, torch.ones(shape)), step(theirs, theirs, torch.ones(shape))
    assert all(bit_identical(mine[key], other[key]) for key in other)
