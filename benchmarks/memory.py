"""What a network keeps from its forward for its backward, as it stands and with bnfast: a part of the first
look.

The tensors are torch's fake ones: autograd and bnfast's operators say what they keep, of which shape and
dtype, and nothing is computed. So ResNet-50's usual batch is counted on any machine."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bnfast
from benchmarks.resnet import resnet50
from benchmarks.session import Session, as_text, progress, section
from bnfast import dispatch

BATCH, SIZE = 256, 224
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
}
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.nn": lambda model: model,
    "converted": bnfast.convert,
    "fused": bnfast.fuse,
}
ABOUT = (
    f"Bytes that autograd keeps from the forward for the backward, in MB: ResNet-50, batch {BATCH}, bf16, "
    "channels_last, with ReLU and with SiLU in its place, both in place. A tensor counts once, where it is "
    "kept first; parameters do not. Of BatchNorm and ReLU both libraries keep the layer's input and the next "
    "one's; bnfast adds one bit an element where a residual is added. An activation whose slope is not seen "
    "from its output makes torch.nn keep the normalized tensor as well."
)


def kept(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Bytes that a training forward keeps, by the name of the child that keeps them first. The children run
    one after another."""
    found: dict[str, int] = {}
    parameters = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    tensors: dict[int, Tensor] = {}  # an address is nobody else's only as long as its tensor lives

    def pack(t: Tensor) -> Tensor:
        tensors.setdefault(t.untyped_storage()._cdata, t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for name, child in model.train().named_children():
            x = child(x)
            sizes = {key: t.untyped_storage().nbytes() for key, t in tensors.items() if key not in parameters}
            found[name] = sum(sizes.values()) - sum(found.values())
    return found


def count(activation: str, variant: str) -> dict[str, int]:
    """Of ResNet-50, as if the kernels ran."""
    # Fake tensors run nothing; this is what lets those of a CPU go the way of a GPU's.
    with mock.patch.object(dispatch, "INTERPRET", True), FakeTensorMode():
        model = VARIANTS[variant](in_bf16(lambda: resnet50(ACTIVATIONS[activation])))
        x = torch.empty(BATCH, 3, SIZE, SIZE, dtype=torch.bfloat16)
        return kept(model, x.to(memory_format=torch.channels_last))


def in_bf16(make: Callable[[], nn.Module]) -> nn.Module:
    """Made so: modules of fake tensors cannot change their dtype later."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def show(session: Session, title: str) -> None:
    """A row for each child of the network, and the total."""
    section(title, ABOUT)
    if session.cannot("memory", "triton"):
        return
    columns = [(activation, variant) for activation in ACTIVATIONS for variant in VARIANTS]
    bar = progress(columns, desc="counting what is kept")
    found = pd.DataFrame(
        {f"{activation}: {variant}": count(activation, variant) for activation, variant in bar}
    )
    found.loc["total"] = total = found.sum()
    found.to_csv(session.folder / "memory.csv", index_label="part")
    print()
    print(as_text((found / 1e6).map("{:.1f}".format).rename_axis("MB").reset_index()))
    ratios = [f"{a} {total[f'{a}: fused'] / total[f'{a}: torch.nn']:.3f}" for a in ACTIVATIONS]
    session.note("memory", "DONE", f"kept for the backward, fused over torch.nn: {', '.join(ratios)}")
