"""Arguments of every type, size and device. What torch's functions and layers refuse, ours refuse with the
same exception and message, before a kernel runs and before anything is updated; what torch's take gives the
same results. DTensors are refused, with a way out."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

import bnfast
from bnfast import functional
from tests.support.buffers import bit_identical
from tests.support.layers import both_modes, data, every_path
from tests.support.versions import TORCH

Given = dict[str, Any]
X, M, V = data(3, 4, 2, 3), data(4, seed=1), data(4, seed=2).square() + 0.5
ONE = torch.tensor(1.0)
TENSORS = {"weight": data(4, seed=3), "bias": data(4, seed=4)}
BATCH = {"input": X, "running_mean": M, "running_var": V, **TENSORS}
# Each case below replaces some of these arguments.
CALLS: dict[str, Given] = {
    "batch_norm": {**BATCH, "training": True},
    "batch_norm, eval": {**BATCH, "training": False},
    "group_norm": {"input": X, "num_groups": 2, **TENSORS},
    "instance_norm": BATCH,
    "instance_norm, eval": {**BATCH, "use_input_stats": False},
    "layer_norm": {"input": data(2, 4), "normalized_shape": (4,), **TENSORS},
}
FLAGS = [1, 0, None, "yes", torch.tensor(True)]
KINDS = [data(4).to(kind) for kind in (torch.int64, torch.bool, torch.complex64)]
FLOAT8 = torch.ones(2, 4, 3, 3).to(torch.float8_e4m3fn)
VECTORS = [[1.0] * 4, 1.0, ONE, data(4, 1), data(3), data(7), data(4).to("meta"), data(8)[::2], *KINDS]
STATISTICS = [*VECTORS, None, M.clone().requires_grad_()]
# What each function is given in the place of one of its arguments.
ARGUMENTS: dict[str, list[Any]] = {
    "input": [
        [[1.0]], None, 1.0, ONE, data(4), data(1, 4), data(3, 4), data(2, 4, 0), data(0, 4, 3), data(2, 0, 3),
        data(1, 4, 1), data(3, 4, 1), data(2, 4, 1, 2, 1, 2), X.long(), X.to(torch.complex64),
    ],
    "weight": [*VECTORS, None], "bias": VECTORS, "running_mean": STATISTICS, "running_var": STATISTICS,
    "momentum": [
        1, 0, True, False, None, "0.1", [0.1], 0.1j, torch.tensor(0.3), torch.tensor(0.3).double(),
        torch.tensor(1), torch.ones(2), torch.full((1,), 0.1),
    ],
    # torch takes a negative eps in most places, and lets the root of a negative number be NaN
    "eps": [1, 0, True, False, -0.01, -10.0, None, "small", torch.tensor(1e-3), torch.ones(2)],
    "training": FLAGS, "use_input_stats": FLAGS, "num_groups": [1, 4, 3, 0, -2, 2.0, True],
    "normalized_shape": [(), 4, (4.0,), (5,), (2, 4), (3, 2, 4)],
}  # fmt: skip
BARE = {"weight": None, "bias": None}
NO_STATISTICS = {"running_mean": None, "running_var": None}
# (function, what is replaced)
TOGETHER: list[tuple[str, Given]] = [
    *((name, BARE) for name in CALLS),
    *(
        (name, {**NO_STATISTICS, **bare})
        for name in CALLS
        if "running_mean" in CALLS[name]
        for bare in ({}, BARE)
    ),
    ("batch_norm", {"momentum": torch.tensor(0.3), "eps": torch.tensor(1e-3)}),
    *((name, {"running_mean": FLOAT8[0, :, 0, 0]}) for name in CALLS if "batch" in name),
    ("group_norm", {"input": data(1, 4), "num_groups": 4}),  # one value a group
    ("group_norm", {"input": data(2, 4), "num_groups": 4}),
    ("group_norm", {"input": data(1, 2, 1, 1), "weight": None, "bias": None}),
    ("group_norm", {"input": data(2, 4, 0), **BARE}),  # an error since torch 2.14, before an empty result
    ("group_norm", {"input": data(2, 0, 3), **BARE}),
    ("instance_norm", {"input": data(3), **NO_STATISTICS, **BARE}),
    ("instance_norm", {"running_mean": data(3), "running_var": data(3)}),
    ("instance_norm, eval", {"running_mean": data(3), "running_var": data(3)}),
    ("layer_norm", {"input": data(2, 2, 4), "normalized_shape": (2, 4), "weight": data(8), "bias": None}),
    ("layer_norm", {"input": data(2, 4).long(), **BARE}),
    ("layer_norm", {"input": data(4), "normalized_shape": (2, 4), **BARE}),
]


def shown(value: Any) -> str:
    return f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else str(value)


def of_functions() -> Iterator[Any]:
    for name, base in CALLS.items():
        function = name.partition(",")[0]
        has = inspect.signature(getattr(F, function)).parameters
        for argument, values in ARGUMENTS.items():
            for value in values if argument in has else ():
                yield pytest.param(
                    function, {**base, argument: value}, id=f"{name}-{argument}-{shown(value)}"
                )
    for name, replaced in TOGETHER:
        yield pytest.param(name.partition(",")[0], CALLS[name] | replaced, id=f"{name}-{','.join(replaced)}")
    # torch's own samples: a momentum of 0 or below, empty inputs, parameters left out
    for op in op_db:
        name = op.name.removeprefix("nn.functional.")
        if name in CALLS and not op.variant_test_name:
            takes = inspect.signature(getattr(F, name))
            for n, sample in enumerate(op.sample_inputs("cpu", torch.float32, requires_grad=True)):
                given = takes.bind(sample.input, *sample.args, **sample.kwargs).arguments
                yield pytest.param(name, given, id=f"{name}-sample-{n}")


def outcome(function: Callable[..., Tensor], given: Given) -> Any:
    """What it raises; or the output, the arguments as it has left them, and their gradients."""
    leaves = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    try:
        y = function(**given)
        if y.requires_grad:
            y.backward(data(*y.shape, seed=5))
    except Exception as error:
        return error
    return [y.detach(), *(t.detach() for t in leaves), *(t.grad for t in leaves)]


def assert_raised_alike(
    ours: Any, theirs: Exception, after: Given, before: Given, launches: list[Any]
) -> None:
    """The first lines are alike; where devices differ, ours goes on to say which argument is elsewhere."""
    assert type(ours) is type(theirs)
    assert str(ours).startswith([*str(theirs).splitlines(), ""][0])
    for name, t in before.items():
        assert not isinstance(t, Tensor) or t.is_meta or bit_identical(after[name], t), name
    assert not launches


def older_eps(name: str, given: Given) -> bool:
    """torch's batch_norm has its present rules and words for eps of 0 and below since 2.13; the layers have
    them with any torch."""
    eps = given.get("eps")
    return (
        TORCH < (2, 13) and name.startswith(("batch_norm", "BatchNorm")) and type(eps) is float and eps <= 0
    )


@every_path
@pytest.mark.parametrize(("name", "given"), [*of_functions()])
def test_functions(name: str, given: Given, path: str, launches: list[Any]) -> None:
    if older_eps(name, given):
        pytest.skip("this torch has other rules for eps")
    held = copy.deepcopy(given)
    ours, theirs = outcome(getattr(functional, name), held), outcome(getattr(F, name), copy.deepcopy(given))
    if isinstance(theirs, Exception):
        assert_raised_alike(ours, theirs, held, given, launches)
    else:
        # Rows of one value have no gradient, but torch's is a rounding error times 1 / sqrt(eps). In general
        # dx is a difference of larger numbers, so the tolerance is above that of assert_close.
        one = name == "layer_norm" and given["input"].shape[-1] == 1
        assert_close(ours, theirs, rtol=1e-5, atol=1e-3 if one else 3e-5, equal_nan=True)
        assert bit_identical(held["input"], given["input"]), "the input was written to"


# Old checkpoints and helpful utilities leave other things than an int64 scalar there.
COUNTERS = [
    torch.tensor([3]), torch.tensor([[3]]), torch.tensor([3, 5]), torch.zeros(0, dtype=torch.int64),
    *(torch.tensor(3).to(kind) for kind in (torch.int32, torch.uint8, torch.float32, torch.float64)),
    torch.tensor(True), torch.tensor([3, 5])[1], None,
]  # fmt: skip
# What BatchNorm2d(4) is made with, is given, or holds in the place of one of its tensors.
OF_BATCH_NORM: dict[str, list[Any]] = {
    "input": [
        X, data(2, 4, 3), data(2, 4, 3, 3, 3), data(2, 5, 3, 3), data(2, 3, 3, 3), data(1, 4, 1, 1),
        X.to("meta"), X.to_sparse(), FLOAT8, *(X.to(kind.dtype) for kind in KINDS),
    ],
    "eps": [0.0, -1.0, 1, None], "momentum": [1, 0, True, "0.1"], "device": ["meta"], "bias": [data(5)],
    "weight": [data(5), data(4).long(), data(4).to("meta")],
    "running_mean": [data(5), data(4, 1), None, data(4).to("meta"), data(4).requires_grad_()],
    "running_var": [data(5), None, data(4).requires_grad_()],
    "num_batches_tracked": COUNTERS,
}  # fmt: skip
# (layer, its arguments, what is replaced)
OF_LAYERS: list[tuple[str, tuple[Any, ...], Given]] = [
    *(("BatchNorm2d", (4,), {name: value}) for name, values in OF_BATCH_NORM.items() for value in values),
    *(("BatchNorm2d", (4,), {"num_batches_tracked": value, "momentum": None}) for value in COUNTERS),
    ("BatchNorm2d", (4,), {"affine": False, "input": data(2, 5, 3, 3)}),
    ("BatchNorm2d", (4,), {"track_running_stats": False, "input": data(2, 5, 3, 3)}),
    ("BatchNorm2d", (0,), {"input": data(2, 0, 3, 3)}),
    *(("BatchNorm1d", (4,), {"input": value}) for value in (X, data(4), data(1, 4))),
    ("BatchNorm3d", (4,), {"input": X}),
    *((f"InstanceNorm{n}d", (4,), {"input": data(4)}) for n in (1, 2, 3)),
    # one sample of another number of channels: a warning, where no parameter has their number
    *((f"InstanceNorm{n}d", (5,), {"input": data(4, 3, 5, 6)[(..., *[0] * (3 - n))]}) for n in (1, 2, 3)),
    ("InstanceNorm2d", (5,), {"input": data(4, 3, 5), "affine": True}),
    *(("LayerNorm", (2,), {"input": value}) for value in (None, [1.0, 2.0])),
]


@every_path
@both_modes
@pytest.mark.parametrize(
    ("name", "arguments", "given"),
    OF_LAYERS,
    ids=[f"{name}-{[*map(shown, given.items())]}" for name, _, given in OF_LAYERS],
)
def test_layers(
    name: str, arguments: Any, given: Given, training: bool, path: str, launches: list[Any]
) -> None:
    """torch has counted the batch by the time that it raises, we have not."""
    if older_eps(name, given):
        pytest.skip("this torch has other rules for eps")
    state, results = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"), []
    for library in (bnfast, nn):
        options = {key: value for key, value in given.items() if key not in ("input", *state)}
        module = getattr(library, name)(*arguments, **options).train(training)
        for key in given.keys() & set(state):
            (module._parameters if key in module._parameters else module._buffers)[key] = copy.deepcopy(
                given[key]
            )
        before = copy.deepcopy(module.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found: Any = module(given.get("input", X)).detach()
            except Exception as error:
                found = error
        results.append((found, module.state_dict(), before, [str(w.message) for w in caught]))
    (ours, after, before, warned), (theirs, expected, _, words) = results
    assert warned == words
    if isinstance(theirs, Exception):
        assert_raised_alike(ours, theirs, after, before, launches)
    else:
        assert_close((ours, dict(after)), (theirs, dict(expected)), rtol=1e-5, atol=2e-5)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One rank of a process group that talks to nobody."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@every_path
@pytest.mark.parametrize("sharded", ["input", "layer"])
def test_dtensor_is_refused(sharded: str, path: str, mesh: Any, launches: list[Any]) -> None:
    """Its statistics would span devices. Computing them shard by shard would be silently wrong."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    module: nn.Module = bnfast.BatchNorm2d(4)
    if sharded == "layer":
        module = distribute_module(module, mesh)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TypeError, match="FSDP2"):
        module(distribute_tensor(X, mesh, [Replicate()]) if sharded == "input" else X)
    assert not launches
    for key, tensor in module.state_dict().items():
        assert torch.equal(*(getattr(t, "to_local", lambda t=t: t)() for t in (tensor, before[key])))
