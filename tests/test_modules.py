"""The layers are drop-ins for torch.nn's: same arguments, same numbers and buffers step by step, checkpoints,
same behaviour under all that handles modules. On the kernels (interpreted) and on the plain-torch path."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db

import bnfast
from tests.support.versions import WITHOUT_BIAS

SHAPE = (3, 4, 3, 2)
PAIRS = {
    "1d": (bnfast.BatchNorm1d, nn.BatchNorm1d),
    "2d": (bnfast.BatchNorm2d, nn.BatchNorm2d),
    "3d": (bnfast.BatchNorm3d, nn.BatchNorm3d),
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum=None": {"momentum": None},
    "momentum=0": {"momentum": 0.0},
    "momentum=1": {"momentum": 1.0},
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
    "eps=0.1": {"eps": 0.1},
    "float64": {"dtype": torch.float64, "device": "cpu"},
}
ARGUMENTS |= {str(without): without for without in WITHOUT_BIAS}
every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)


def same_seed(maker: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = maker()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


def pair(*args: Any, dims: str = "2d", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch.nn's) with the same random parameters."""
    ours, theirs = (same_seed(lambda c=c: c(*args, **kwargs)) for c in PAIRS[dims])
    return ours, theirs


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) + 0.5


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """One forward and backward: everything it leaves behind."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(data(*y.shape, dtype=y.dtype, seed=2))
    gradients = {f"d{name}": p.grad for name, p in module.named_parameters()}
    state = {k: v.clone() for k, v in module.state_dict().items()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **state}


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert_close(ours[key], expected, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


@every_path
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_trains_and_evaluates_like_torch(arguments: dict[str, Any], path: str, launches: list[Any]) -> None:
    ours, theirs = pair(4, **arguments)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    first, second, third = (
        data(*SHAPE, dtype=arguments.get("dtype", torch.float32), seed=n) for n in (1, 2, 3)
    )
    assert_same(step(ours, first), step(theirs, first))
    assert_same(step(ours, second), step(theirs, second))
    assert_same(step(ours.eval(), third), step(theirs.eval(), third))
    assert bool(launches) == (path == "kernels")


SAMPLES = [
    pytest.param(
        name.removeprefix("BatchNorm"),
        sample,
        training,
        id=f"{name}-{sample.desc or 'default'}-{'train' if training else 'eval'}",
    )
    for info in module_db
    if (name := info.module_cls.__name__) in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
    for training in (True, False)
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
    )
]


@every_path
@pytest.mark.parametrize(("dims", "sample", "training"), SAMPLES)
def test_torch_module_info(dims: str, sample: Any, training: bool, path: str) -> None:
    """torch's own samples, the empty batch among them."""
    built = sample.constructor_input
    ours, theirs = (m.train(training) for m in pair(*built.args, dims=dims, **built.kwargs))
    (x,) = sample.forward_input.args
    # dx is a difference of larger numbers, hence an absolute tolerance some ulp above assert_close's
    assert_same(step(ours, x), step(theirs, x), rtol=1e-5, atol=3e-5)


@every_path
def test_statistics_of_their_own_dtype(path: str) -> None:
    """Parameters in fp32, activations in bf16, as mixed precision has them; the buffers stay fp32."""
    ours, theirs = pair(4)
    x = data(*SHAPE, dtype=torch.bfloat16)
    mine, other = step(ours, x), step(theirs, x)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}
    assert_same(mine, other, rtol=2e-2, atol=2e-2)
    assert_close(mine["running_mean"], 0.1 * x.double().mean((0, 2, 3)), check_dtype=False)


def test_half_layer_takes_float_input() -> None:
    """.half() turns parameters and statistics into fp16; the kernels compute in fp32 whatever they are."""
    ours, theirs = pair(4)
    x = data(*SHAPE)
    result, expected = step(ours.half(), x), step(theirs, x)
    assert result["y"].dtype == torch.float32
    assert result["dweight"].dtype == result["running_mean"].dtype == torch.float16
    assert_same(result, expected, rtol=2e-3, atol=2e-3, check_dtype=False)


@every_path
@pytest.mark.parametrize("from_ours", [True, False], ids=["ours to torch", "torch to ours"])
def test_checkpoints_load_both_ways(from_ours: bool, path: str) -> None:
    source, target = pair(4) if from_ours else reversed(pair(4))
    step(source, data(*SHAPE))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file), strict=True)
    assert_same(step(target.eval(), data(*SHAPE)), step(source.eval(), data(*SHAPE)))


def test_version_1_checkpoint_loads_strictly() -> None:
    """Checkpoints from before torch 0.4.1 know no num_batches_tracked."""
    ours, theirs = pair(4)
    step(theirs, data(*SHAPE))
    new = theirs.state_dict()
    new.pop("num_batches_tracked")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(new, strict=True)
    new._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    ours.num_batches_tracked.fill_(3)
    ours.load_state_dict(new, strict=True)
    assert ours.num_batches_tracked == 3  # torch's rule: what the file lacks stays as it is
    assert_close(ours.running_mean, theirs.running_mean, rtol=0, atol=0)


@pytest.mark.parametrize("dims", PAIRS)
def test_is_a_torch_layer(dims: str) -> None:
    """Weight-decay filters, freezers and update_bn look for the classes."""
    ours, theirs = pair(4, dims=dims)
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert type(ours).__name__ == type(theirs).__name__


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@every_path
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_are_independent(clone: Callable[[nn.Module], nn.Module], path: str) -> None:
    ours, _ = pair(4)
    step(ours, data(*SHAPE))
    before = copy.deepcopy(ours.state_dict())
    twin = clone(ours)
    assert type(twin) is type(ours)
    after = step(twin, data(*SHAPE))
    assert after["num_batches_tracked"] == 2
    assert_same(ours.state_dict(), before, rtol=0, atol=0)
    assert_same(step(ours, data(*SHAPE)), after, rtol=0, atol=0)


def test_meta_device_then_to_empty() -> None:
    ours = bnfast.BatchNorm2d(4, device="meta")
    y = ours(torch.empty(SHAPE, device="meta").to(memory_format=torch.channels_last))
    assert y.shape == SHAPE
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        assert bnfast.BatchNorm2d(4).weight.is_meta
    ours = ours.to_empty(device="cpu")
    ours.reset_parameters()
    assert_same(step(ours, data(*SHAPE)), step(nn.BatchNorm2d(4), data(*SHAPE)))


@every_path
def test_functional_call_updates_only_what_it_is_given(path: str) -> None:
    ours, theirs = pair(4)
    results = []
    for module in (ours, theirs):
        state = {k: v.detach() + 1 for k, v in module.state_dict().items()}
        y = torch.func.functional_call(module, state, (data(*SHAPE),))
        results.append({"y": y.detach(), **state})
        assert module.num_batches_tracked == 0
        assert not module.running_mean.any()
    assert_same(*results)


@every_path
def test_stacked_models(path: str) -> None:
    """Ensembling: two evaluated models as one, by vmap over their states."""
    models = [pair(4)[0].eval() for _ in range(2)]
    models[1].running_mean.add_(1)
    x = data(*SHAPE)
    state = torch.func.stack_module_state(models)
    y = torch.func.vmap(lambda s: torch.func.functional_call(models[0], s, (x,)))(state)
    assert_close(y, torch.stack([m(x) for m in models]))


def network(layer: type[nn.Module]) -> nn.Module:
    return same_seed(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), layer(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


@every_path
def test_update_bn(path: str) -> None:
    """Stochastic weight averaging recomputes the statistics, as a cumulative average over three batches."""
    ours, theirs = network(bnfast.BatchNorm2d), network(nn.BatchNorm2d)
    batches = [data(n, 2, 5, 5, seed=n) for n in (2, 3, 4)]
    for model in (ours, theirs):
        torch.optim.swa_utils.update_bn(batches, model)
    assert ours[1].momentum == 0.1
    assert_same(ours.state_dict(), theirs.state_dict())


def test_fuse_conv_bn_eval() -> None:
    model = network(bnfast.BatchNorm2d)
    model(data(2, 2, 5, 5))
    model.eval()
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    x = data(2, 2, 5, 5)
    assert_close(fused(x), model[1](model[0](x)), rtol=1e-5, atol=1e-5)


def test_convert_sync_batchnorm_keeps_parameters() -> None:
    model = network(bnfast.BatchNorm2d)
    old = model[1]
    new = nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]
    assert type(new) is nn.SyncBatchNorm
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert new.running_var is old.running_var
    assert new.num_batches_tracked is old.num_batches_tracked
