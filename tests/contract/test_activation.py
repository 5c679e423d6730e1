"""What `activation=` and a residual may be, and what layers and functions make of them: act(norm(x) + z) in
one go, as torch does it one after another."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast import functional
from bnfast.activation import NAMES, PARAMETERS, Activation
from tests.support import fused_cases, layers
from tests.support.buffers import assert_same_bits, nan_filled_allocations
from tests.support.families import BF16, DTYPES, FP16, FP32, FP64
from tests.support.layers import KINDS, NORMS, Layer, assert_same, data, norms, step

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max
ALIKE: dict[Activation, list[Any]] = {
    Activation("relu"): [
        "ReLU", Activation("ReLU"), nn.ReLU, nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_,
    ],
    Activation("relu6"): [nn.ReLU6, nn.ReLU6(), nn.Hardtanh(0.0, 6.0), F.relu6],
    Activation("leaky_relu", 0.01): ["LeakyReLU", "leakyrelu", nn.LeakyReLU, F.leaky_relu],
    Activation("leaky_relu", 0.3): [("LeakyReLU", 0.3), nn.LeakyReLU(0.3)],
    Activation("leaky_relu", 1.0): [("leaky_relu", 1)],
    Activation("elu", 1.0): [nn.ELU, F.elu],
    Activation("elu", 0.5): [nn.ELU(0.5)],
    Activation("silu"): ["SiLU", "swish", "Swish", nn.SiLU(), F.silu],
    Activation("gelu"): [nn.GELU, F.gelu],
    Activation("gelu_tanh"): [nn.GELU("tanh")],
    Activation("hardswish"): ["hard_swish", "Hardswish", nn.Hardswish()],
    Activation("hardsigmoid"): ["hard_sigmoid", nn.Hardsigmoid()],
    Activation("mish"): [nn.Mish],
    Activation("sigmoid"): [nn.Sigmoid(), torch.sigmoid],
    Activation("tanh"): [nn.Tanh(), torch.tanh],
}  # fmt: skip
SPELLINGS = [(spelling, meant) for meant, spellings in ALIKE.items() for spelling in spellings]
SPELLINGS += [((meant.name, meant.parameter), meant) for meant in map(Activation.of, NAMES)]


class OwnReLU(nn.ReLU):
    """A subclass of a user, whose forward may be anything."""


HOOKED, PATCHED = nn.ReLU(), nn.ReLU()
HOOKED.register_forward_hook(lambda *_: None)
PATCHED.forward = torch.neg
REFUSED: list[Any] = [
    "", "relu7", "softplus", 3, len, True, ("relu", 0.1), ("leaky_relu", "a"), ("leaky_relu", 0.1, 0.2), (),
    ["relu"], {"relu": 1}, ("leaky_relu", True), ("leaky_relu", 10**400), ("leaky_relu", torch.tensor(0.1)),
    *((name, slope) for name in PARAMETERS for slope in (NAN, INF, -INF, 2 * LARGEST)),
    nn.LeakyReLU(NAN), nn.ELU(INF), nn.LeakyReLU(torch.tensor(0.1)), nn.Hardtanh(-1, 1), nn.Hardtanh,
    nn.PReLU(), nn.PReLU, nn.Softplus(), nn.Module, OwnReLU(), OwnReLU, HOOKED, PATCHED,
    F.hardtanh, F.softplus, torch.neg,
]  # fmt: skip


def shown(value: Any) -> str:
    """Without addresses: workers must agree on what a test is called."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    return getattr(value, "__name__", None) or repr(value)


@pytest.mark.parametrize(("given", "meant"), SPELLINGS, ids=shown)
def test_one_record_for_all_spellings(given: Any, meant: Activation) -> None:
    found = Activation.of(given)
    assert type(found) is Activation
    assert found == meant
    assert Activation.of(found) == found
    v = torch.linspace(-8, 8, 33, dtype=FP64)
    if isinstance(given, type):
        given = given()
    if callable(given) and not isinstance(given, tuple):
        assert_close(found.apply(v), given(v.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", REFUSED, ids=shown)
def test_what_it_may_not_be(wrong: Any) -> None:
    mean, variance = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="^activation "):
        functional.batch_norm(data(2, 4, 5), mean, variance, training=True, activation=wrong)
    assert mean.eq(0).all(), "the batch was counted"
    for layer in KINDS:
        with pytest.raises(ValueError, match="^activation "):
            layer.ours(*layer.arguments, activation=wrong)
    for name in NORMS:
        with pytest.raises(ValueError, match="^activation "):
            norms(name)[0](data(2, 4, 5), activation=wrong)


LIST = "relu, relu6, leaky_relu, .*tanh"
RANGE = r"leaky_relu.*between -3\.4e38 and 3\.4e38, but got"
WORDS = [(nn.Hardtanh(-1, 1), LIST), (nn.PReLU(), LIST), ("softplus", LIST), (("leaky_relu", NAN), RANGE)]


@pytest.mark.parametrize(("wrong", "words"), WORDS, ids=shown)
def test_the_message_has_what_may_come_and_what_came(wrong: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        Activation.of(wrong)
    assert repr(wrong) in str(raised.value)


@layers.every_path
@pytest.mark.parametrize(
    "activation", [("leaky_relu", -2.0), ("leaky_relu", LARGEST), ("elu", -0.5), ("elu", 0.0)], ids=shown
)
def test_the_whole_range_is_right(activation: Any, path: str) -> None:
    """Forward and backward find the side of 0 from x, so the slope below it may have either sign."""
    x = torch.tensor([-3.0, -0.5, -0.0, 0.0, 0.5, 3.0], requires_grad=True)
    v = x.detach().double().requires_grad_()
    tiny = 1e-30  # which 1 + tiny has no digits for
    found = functional.batch_norm(
        x[None, None], torch.zeros(1), torch.ones(1), eps=tiny, activation=activation
    )[0, 0]
    expected = Activation.of(activation).apply(v)
    slopes = (torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in ((found, x), (expected, v)))
    assert_close(found, expected.float(), rtol=1e-6, atol=0)
    assert_close(*(slope.float() for slope in slopes), rtol=1e-6, atol=0)


class Followed(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.norm, self.slope = nn.BatchNorm2d(4), slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(x), self.slope)


UNFUSED = [nn.LeakyReLU(NAN), nn.LeakyReLU(INF), nn.ELU(-INF), nn.LeakyReLU(torch.tensor(0.1))]


@pytest.mark.parametrize(
    "model", [*(nn.Sequential(nn.BatchNorm2d(4), act) for act in UNFUSED), Followed(NAN), Followed(INF)]
)
def test_fuse_leaves_what_it_may_not_be_alone(model: nn.Module) -> None:
    x, expected = data(2, 4, 3, 3), copy.deepcopy(model)(data(2, 4, 3, 3))
    fused = bnfast.fuse(copy.deepcopy(model))
    assert "0 fused, 1 not" in str(bnfast.fusion_report(fused))
    assert_close(fused(x), expected, equal_nan=True)


in_words = pytest.mark.parametrize("activation", [nn.LeakyReLU(0.3), "LeakyReLU", F.silu, nn.GELU], ids=shown)


@in_words
@pytest.mark.parametrize("later", [False, True], ids=["constructed with it", "given it later"])
@layers.every_layer
def test_layers_hold_the_record(layer: Layer, later: bool, activation: Any) -> None:
    """No module becomes part of the layer: the same keys and children as without."""
    plain, meant = layer.make(**(layer.tracks or {})), Activation.of(activation)
    assert plain.activation is None
    assert "activation" not in repr(plain)
    module = copy.deepcopy(plain)
    if later:
        module.activation = meant
    else:
        module = layer.ours(*layer.arguments, **(layer.tracks or {}), activation=activation)
        module.load_state_dict(plain.state_dict())
    x, z = layer.input(), layer.input(1)
    expected = meant.apply(copy.deepcopy(plain)(x) + z)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.activation == meant
        assert type(other.activation) is Activation
        assert not list(other.children())
        assert other.state_dict().keys() == plain.state_dict().keys()
        assert f"activation={tuple(meant) if meant.parameter else meant.name}" in repr(other)
        assert_close(copy.deepcopy(other)(x, residual=z), expected)
    with pytest.raises(RuntimeError, match="activation|BatchRenorm"):
        torch.jit.script(module)


@pytest.mark.usefixtures("plain_torch")
@in_words
def test_compiled(activation: Any) -> None:
    """Without a graph break, the argument being part of what is compiled."""
    torch._dynamo.reset()
    x, function = data(2, 4, 3, 5), norms("batch")[0]
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert_close(compiled(x, activation=activation), function(x, activation=activation))


WRONG_RESIDUALS = {
    "shape": (lambda x: x[:1], ValueError, "shape"),
    "broadcast": (lambda x: x[:, :1], ValueError, "shape"),
    "dtype": (lambda x: x.double(), ValueError, "dtype"),
    "device": (lambda x: x.to("meta"), ValueError, "device"),
    "number": (lambda x: 1.0, TypeError, "Tensor or None"),
}


@layers.every_path
@pytest.mark.parametrize(("wrong", "error", "named"), WRONG_RESIDUALS.values(), ids=WRONG_RESIDUALS.keys())
@layers.every_layer
def test_a_residual_is_as_input_is(
    layer: Layer, wrong: Any, error: type[Exception], named: str, path: str
) -> None:
    module, x = layer.make(**(layer.tracks or {})), layer.input()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=f"residual.*{named}"):
        module(x, residual=wrong(x))
    assert_close(module.state_dict(), before, rtol=0, atol=0)


@layers.every_path
@layers.both_modes
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@layers.every_layer
def test_layers_add_and_activate(layer: Layer, activation: str, training: bool, path: str) -> None:
    """Beside the layer alone, whose running statistics they share, in fp64: a batch, an empty one, and one in
    inference mode. Batch Renormalization has its limits at work."""
    limits = {"r_max": 1.1, "d_max": 0.2, "warmup_steps": 0, "r_max_steps": 0, "d_max_steps": 0}
    options = (layer.tracks or {}) | (limits if "Renorm" in layer.name else {})
    alone = layer.make(**options, dtype=FP64).train(training)
    module, act = copy.deepcopy(alone), getattr(F, activation)
    module.activation = Activation(activation)
    # torch refuses an empty batch to an InstanceNorm with statistics
    for count in (layer.shape[0], *([] if "Instance" in layer.name else [0])):
        x, results = layer.input(dtype=FP64)[:count], []
        for of, run in ((module, module), (alone, lambda x, z: act(alone(x) + z))):
            z = layer.input(1, FP64)[:count].requires_grad_()
            found = step(of, x, lambda x, run=run, z=z: run(x, z))
            results.append({**found, "dz": z.grad})
        assert_same(*results, rtol=1e-10, atol=1e-10)
    x, z = layer.input(2, FP64), layer.input(3, FP64)
    with torch.inference_mode():
        assert_close(module(x, residual=z), act(alone(x) + z))


@layers.every_path
@pytest.mark.parametrize("norm", [norm for norm in NORMS if "tracking" not in norm])
def test_vmap(norm: str, path: str) -> None:
    x, z = data(3, 2, 4, 5), data(3, 2, 4, 5, seed=1)
    ours, theirs = (
        torch.vmap(lambda x, z, f=f: f(x, None, None, z, activation="relu"))(x, z) for f in norms(norm)
    )
    assert_close(ours, theirs)


# both addressings and what does not fit them: odd channels, odd planes, runs in pieces, a value a channel
SHAPES = [(6, 16, 4, 6), (2, 16, 7, 7), (3, 12, 5, 3), (1, 4, 64, 66), (24, 40), (2, 8, 3, 4, 5)]
SMALL = (3, 8, 2, 4)
SOME = ("relu", F.silu, nn.LeakyReLU(0.2), None)
# (layer, shape, dtype, layout, activation, with a residual). Of relu, mask are kept where sizes allow them.
FUSED: list[tuple[str, tuple[int, ...], torch.dtype, str, Any, bool]] = [
    *product(("train", "group"), [SMALL], [FP32], ["contiguous"], NAMES, (False, True)),
    *product(fused_cases.LAYERS, [SMALL], [FP32], ["channels_last"], SOME, (False, True)),
    *product(("train", "group", "layer"), SHAPES, [BF16, FP32], fused_cases.FORMATS, ["relu"], [True]),
    *product(("train", "group", "layer"), SHAPES, [BF16], fused_cases.FORMATS, ["silu"], [True]),
    *product(fused_cases.LAYERS, SHAPES[:1], [FP16, BF16, FP64], ["channels_last"], ["relu"], (False, True)),
]
# One in seven is executed as compiled PTX in every run. Together they have every layer and dtype, with and
# without a residual, and both layouts; the others are interpreted, which takes a third of the time.
# Every seventh; and rows in fp64, which the interpreter adds up one after another, and hardware as a tree
ON_PTX = [
    n % 7 == 0 or (layer, dtype, layout) == ("train", torch.float64, "channels_last")
    for n, (layer, _, dtype, layout, *_) in enumerate(FUSED)
]
EXECUTED = [
    pytest.param(case, "kernels", marks=pytest.mark.compiled)
    for case, executed in zip(FUSED, ON_PTX, strict=True) if executed
]  # fmt: skip
INTERPRETED = [case for case, executed in zip(FUSED, ON_PTX, strict=True) if not executed]
# split over programs; not; odd channels; odd planes; 7x7; a value a channel of a sample; volumes
LARGER = (
    (16, 64, 56, 56), (8, 256, 14, 14), (5, 24, 9, 11), (4, 40, 17, 17), (64, 512, 7, 7), (300, 96),
    (2, 16, 8, 20, 24),
)  # fmt: skip
VALUES = (*NAMES, ("leaky_relu", 0.2), ("elu", 0.5))
FUSED_ON_GPU = [
    *product(fused_cases.LAYERS, [(8, 64, 14, 14)], [BF16], fused_cases.FORMATS, VALUES, (False, True)),
    *product(fused_cases.LAYERS, LARGER, DTYPES, fused_cases.FORMATS, ["relu"], (False, True)),
]


@pytest.mark.parametrize(
    ("case", "path"),
    [
        *EXECUTED,
        *product(INTERPRETED, ["kernels"]),
        *product(FUSED, ["torch"]),
        *(pytest.param(case, "kernels", marks=pytest.mark.gpu) for case in FUSED_ON_GPU),
    ],
    indirect=["path"],
    ids=shown,
)
def test_functions_add_and_activate(case: Any, path: str, device: torch.device) -> None:
    """Against fp64, and on a GPU with the same bits every time."""
    layer, shape, dtype, layout, activation, residual = case
    if layer == "instance" and len(shape) == 2:
        pytest.skip("InstanceNorm has no such input")
    g = fused_cases.given(shape, dtype, layer, layout, residual, device=device.type)
    before = {name: t.clone() for name, t in g.items()}
    with nan_filled_allocations():
        found = fused_cases.run(fused_cases.ours(layer, activation), g)
    assert_same_bits(g, before, "was written to")
    fused_cases.check(layer, activation, g, found)
    for _ in range(3 if device.type == "cuda" else 0):
        assert_same_bits(fused_cases.run(fused_cases.ours(layer, activation), g), found)
