"""LayerNorm under all that captures graphs or handles modules: opcheck, torch.compile whole, export and
tracing to plain aten, scripting, torch.fx, copies, meta tensors."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.test_layernorm_layer import CLOSE, data, every_path, pair, step

OPERATORS = torch.ops.bnfast
OPCHECKED = {
    "fp32": ((4, 6), torch.float32, True, 1),
    "bf16, two dimensions": ((3, 2, 6), torch.bfloat16, True, 2),
    "fp64, x alone": ((4, 6), torch.float64, False, 1),
    "no batch": ((4, 6), torch.float32, True, 2),
}


WANTED = ((True, torch.float32, torch.float32), (True, None, None), (False, torch.float64, None))


@pytest.mark.parametrize(("shape", "dtype", "affine", "dims"), OPCHECKED.values(), ids=OPCHECKED.keys())
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype, affine: bool, dims: int) -> None:
    for x in (data(*shape).to(dtype), data(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape))))):
        weight, bias = (data(*shape[-dims:], seed=n) if affine else None for n in (1, 2))
        for keep in (True, False):
            torch.library.opcheck(OPERATORS.layer_norm, (x, weight, bias, dims, 1e-5, keep))
        y, table, _ = OPERATORS.layer_norm(x, weight, bias, dims, 1e-5, True)
        for wanted in WANTED:
            given = (x, y.clone(), weight, table, dims, *wanted)
            torch.library.opcheck(OPERATORS.layer_norm_backward, given)


@every_path
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_whole_graph(backend: str, path: str) -> None:
    """Several batch sizes: the second recompiles, for all further ones."""
    torch._dynamo.reset()
    ours, theirs = pair((2, 6))
    run = torch.compile(ours, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for n in (3, 5, 4, 7):
            x = data(n, 2, 6, seed=n)
            assert_close(step(run, ours, x), step(theirs, theirs, x), **CLOSE)


def test_graphs_of_others_are_plain_aten() -> None:
    ours, theirs = pair(6)
    x = data(4, 6)
    program = torch.export.export(ours, (x,))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert targets == {"aten.layer_norm.default"}
    traced = torch.jit.trace(ours, x)
    assert "aten::layer_norm" in {n.kind() for n in traced.inlined_graph.nodes()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(ours)
    for module in (program.module(), traced, scripted):
        assert_close(module(data(4, 6, seed=1)), theirs(data(4, 6, seed=1)), **CLOSE)


def test_fx_leaf() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), bnfast.LayerNorm(6)))
    (node,) = (n for n in graph.graph.nodes if n.target == "1")
    assert node.op == "call_module"
    assert type(graph.get_submodule("1")) is bnfast.LayerNorm

    class Scaled(bnfast.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(torch.fx.proxy.TraceError, match="a forward of its own"):
        torch.fx.symbolic_trace(nn.Sequential(Scaled(6)))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(clone: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = pair(6, eps=1e-3)
    assert isinstance(ours, nn.LayerNorm)
    twin = clone(ours)
    assert type(twin) is bnfast.LayerNorm
    with torch.no_grad():
        ours.weight.zero_()
    twin.load_state_dict(theirs.state_dict())
    assert_close(twin(data(3, 6)), theirs(data(3, 6)), **CLOSE)


def test_meta_device() -> None:
    ours = bnfast.LayerNorm(6, device="meta", dtype=torch.bfloat16)
    assert ours(torch.empty(3, 6, device="meta", dtype=torch.bfloat16)).shape == (3, 6)
    assert ours.to_empty(device="cpu").weight.dtype == torch.bfloat16
