"""The job `digits`: a small residual network on scikit-learn's bundled digits, trained with torch.nn's layer
and with bnfast's, to see that they agree. The first look begins with it.

Two correct implementations round differently, and training magnifies it: once a ReLU's input falls to
different sides of zero, the curves part. In fp32 that happens within a hundred steps, so only the
beginning can be held to a close limit there; in fp64 nothing of it is seen, and the whole run is.

Without a GPU bnfast runs plain torch, so the first steps run again with the kernels themselves, in
Triton's interpreter: slow, but it is their own code on real activations. It must be asked for before
Triton is imported, so `kernel_steps` starts this module as a process of its own, which sends back what it
found."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import bnfast
from benchmarks import LAYERS, ROOT, pictures
from benchmarks.session import Session, as_text, begin, paragraph, progress, section
from benchmarks.timing import one_thread
from bnfast.kernels.records import Renorm
from bnfast.reference.batchrenorm import batch_renorm
from codegen.cases import NAMES

Norm = Callable[[int], nn.Module]
Apart = dict[str, float]  # differences of two runs, or their limits, by name
BEGINNING = 8  # steps
GROUPS = 4
TIME_LIMIT = 240  # seconds
# The digits, trained in full. fp32: the later limits only catch a curve that goes another way altogether.
FULL: dict[torch.dtype, Apart] = {
    torch.float32: {"beginning": 1e-4, "losses": 0.5, "gradients": 1e-4, "accuracy": 0.03},
    torch.float64: {
        "beginning": 1e-11, "losses": 1e-8, "gradients": 1e-10, "parameters": 1e-7, "buffers": 1e-7,
        "accuracy": 0.003,
    },
}  # fmt: skip
# A few steps on small batches, in fp32: too short for rounding to grow.
FEW_STEPS: Apart = {"losses": 1e-5, "gradients": 1e-4, "parameters": 1e-4, "buffers": 1e-4}


# what is trained


class Block(nn.Module):
    """Two 3x3 convolutions and a way round them, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def network(norm: Norm, width: int) -> nn.Module:
    """A stem, three residual blocks (8x8, 8x8 to 4x4, 4x4 to 2x2), average pooling and ten outputs."""
    stem = (nn.Conv2d(1, width, 3, 1, 1, bias=False), norm(width), nn.ReLU())
    sizes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
    blocks = (Block(*size, norm) for size in sizes)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class OverChannels(nn.Module):
    """A LayerNorm over the channels of each position of [N, C, H, W], as ConvNeXt has it (Liu et al. 2022,
    arXiv 2201.03545). Its result is contiguous: torch 2.13's convolutions of few channels were seen to write
    past their memory on a CPU where it was channels_last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class PlainBatchRenorm2d(bnfast.BatchRenorm2d):
    """By the plain formulas, whatever the device: torch.nn has no Batch Renormalization to compare with."""

    def normalize(self, input: Tensor, activation: Any, residual: Tensor | None) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        if not self.training:
            return nn.functional.batch_norm(input, *state, False, 0.0, self.eps)
        limits = (self.r_max, self.d_max, self.warmup_steps, self.r_max_steps, self.d_max_steps)
        renorm = Renorm(*limits, guarded=False)
        return batch_renorm(input, *state, self.momentum, self.eps, renorm, self.num_batches_tracked)


def schedule(steps: int) -> dict[str, Any]:
    """Batch Renormalization's arguments for a run of so many steps; the paper's are for far longer ones.
    BatchNorm for a quarter of it, and the limits in full after three. After the warm-up r reaches from 0.7 to
    1.3 here and d up to 0.4, so these limits cut some off."""
    ends = {"warmup_steps": steps // 4, "r_max_steps": steps * 3 // 4, "d_max_steps": steps // 2}
    return {**ends, "r_max": 1.1, "d_max": 0.2, "momentum": 0.1}


def pair(layer: str, steps: int) -> tuple[Norm, Norm]:
    """torch.nn's layer and bnfast's, which should do the same, for a run of so many steps."""
    if layer == "BatchRenorm":
        arguments = schedule(steps)
        return partial(PlainBatchRenorm2d, **arguments), partial(bnfast.BatchRenorm2d, **arguments)
    if layer == "GroupNorm":
        return partial(nn.GroupNorm, GROUPS), partial(bnfast.GroupNorm, GROUPS)
    if layer == "InstanceNorm":
        return partial(nn.InstanceNorm2d, affine=True), partial(bnfast.InstanceNorm2d, affine=True)
    if layer == "LayerNorm":
        return lambda c: OverChannels(nn.LayerNorm(c)), lambda c: OverChannels(bnfast.LayerNorm(c))
    if layer == "BatchNorm":
        return nn.BatchNorm2d, bnfast.BatchNorm2d
    raise ValueError(f"there is no layer {layer!r} to train with; there are {', '.join(LAYERS)}")


def load(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """8x8 grey images of handwritten digits, 0 to 9, in random order, and their labels."""
    from sklearn.datasets import load_digits  # it may not be installed

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order].to(device), torch.tensor(raw.target, dtype=torch.int64)[order].to(device)


@dataclass(frozen=True)
class Recipe:
    """One training run, by SGD with momentum 0.9. steps: stop after so many, whatever the epochs. held:
    images that are held back for testing."""

    epochs: int = 6
    batch: int = 64
    width: int = 16
    seed: int = 0
    dtype: torch.dtype = torch.float32
    steps: int | None = None
    held: int = 359


@dataclass
class Run:
    """What a training run left behind: the gradients are of the first step, the rest is of the end."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    accuracy: float = float("nan")


def batches(count: int, recipe: Recipe) -> list[Tensor]:
    """The rows of every batch of a run, shuffled anew each epoch; a last short batch is left out."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    orders = [torch.randperm(count, generator=generator) for _ in range(recipe.epochs)]
    rows = [each for order in orders for each in order[: count - count % recipe.batch].split(recipe.batch)]
    return rows[: recipe.steps]


def train(norm: Norm, digits: tuple[Tensor, Tensor], recipe: Recipe, label: str = "training") -> Run:
    """Trains from scratch."""
    images, labels, held, run = digits[0].to(recipe.dtype), digits[1], recipe.held, Run()
    torch.manual_seed(recipe.seed)
    model = network(norm, recipe.width).to(images.device, recipe.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False)
    with exact, one_thread():  # so that only the normalization may differ
        for rows in progress(batches(len(images) - held, recipe), desc=label):
            rows = rows.to(images.device) + held
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            if not run.losses:
                grads = {name: p.grad for name, p in model.named_parameters()}
                run.gradients = {name: g.cpu().clone() for name, g in grads.items() if g is not None}
            optimizer.step()
            run.losses.append(loss.item())
        model.eval()  # with the running statistics
        with torch.no_grad():
            right = model(images[:held]).argmax(1) == labels[:held]
    run.accuracy = float(right.double().mean())
    run.parameters = {name: value.detach().cpu() for name, value in model.named_parameters()}
    run.buffers = {name: value.detach().cpu() for name, value in model.named_buffers()}
    return run


# how far two runs lie apart


def largest(first: dict[str, Tensor], second: dict[str, Tensor], norm: float, relative: bool) -> float:
    """The largest distance of two tensors, relative to the first's norm or not."""
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        raise ValueError("the two networks do not have the same parameters and buffers")
    apart = []
    for name, a in first.items():
        distance = torch.linalg.vector_norm(a.double() - second[name].double(), norm)
        apart.append(distance / torch.linalg.vector_norm(a.double(), norm) if relative else distance)
    return float(torch.stack(apart).max())  # a NaN stays one, which Python's max() would lose


def compare(first: Run, second: Run) -> Apart:
    """Gradients in norm, relative to the first run's; all else by element. Networks without buffers have no
    figure of them."""
    losses = torch.tensor([first.losses, second.losses], dtype=torch.float64).diff(dim=0).abs()[0]
    found = {
        "beginning": float(losses[:BEGINNING].max()),
        "losses": float(losses.max()),
        "gradients": largest(first.gradients, second.gradients, 2, relative=True),
        "parameters": largest(first.parameters, second.parameters, float("inf"), relative=False),
        "accuracy": abs(first.accuracy - second.accuracy),
    }
    if first.buffers or second.buffers:
        found["buffers"] = largest(first.buffers, second.buffers, float("inf"), relative=False)
    return found


def beyond(apart: Apart, limits: Apart) -> list[str]:
    """What is not within its limit. Written so that a NaN is not within any."""
    found = [(name, apart[name], limit) for name, limit in limits.items() if name in apart]
    return [f"{name} differ by {a:.1e}, more than {limit:.0e}" for name, a, limit in found if not a <= limit]


# the kernels in the interpreter


@contextmanager
def counted_launches() -> Iterator[list[int]]:
    """Counts kernels as they are interpreted, lest a comparison of torch with torch pass for one."""
    from triton.runtime.interpreter import GridExecutor  # it may not be installed

    count, original = [0], GridExecutor.__call__

    def counting(self: GridExecutor, *args: object, **kwargs: object) -> object:
        count[0] += 1
        return original(self, *args, **kwargs)

    GridExecutor.__call__ = counting
    try:
        yield count
    finally:
        GridExecutor.__call__ = original


def first_steps(layer: str, steps: int, batch: int, width: int) -> dict[str, Any]:
    """Both runs, in this process, which must have been started with TRITON_INTERPRET=1: their losses, what
    they differ by, how many kernels were launched, and in how many calls of a layer."""
    from bnfast.interpreted import prepared  # needs Triton

    theirs, ours = pair(layer, steps)
    recipe = Recipe(epochs=1, batch=batch, width=width, steps=steps, held=batch)
    data = load(recipe.seed, torch.device("cpu"))
    plain = train(theirs, data, recipe)
    with prepared(), counted_launches() as launches:
        run = train(ours, data, recipe, "steps in the interpreter")
    layers = sum(type(m) is type(ours(width)) for m in network(ours, width).modules())
    calls = layers * (2 * steps + 1)  # forward and backward, and once in eval
    curves = {"theirs": plain.losses, "ours": run.losses, "apart": compare(plain, run)}
    return {**curves, "launches": launches[0], "calls": calls}


def kernel_steps(layer: str, steps: int = 3, batch: int = 8, width: int = 8) -> dict[str, Any]:
    """`first_steps` in a process with Triton's interpreter on."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "outcome.json")
        asked = [str(out), layer, *map(str, (steps, batch, width))]
        command = [sys.executable, "-m", "benchmarks.digits", *asked]
        variables = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run(command, check=True, timeout=TIME_LIMIT, env=variables, cwd=ROOT)
        return dict(json.loads(out.read_text(encoding="utf-8")))


def kernel_faults(found: dict[str, Any]) -> list[str]:
    """Empty if the kernels ran, at least one in every call of a layer, and agree."""
    faults = beyond(found["apart"], FEW_STEPS)
    if found["launches"] < found["calls"]:
        faults.append(f"{found['launches']} kernels were launched in {found['calls']} calls")
    return faults


# the job


def step_by_step(theirs: list[float], ours: list[float]) -> pd.DataFrame:
    table = pd.DataFrame({"step": range(1, len(theirs) + 1), "theirs": theirs, "bnfast": ours})
    return table.assign(difference=table["bnfast"] - table["theirs"])


def show_losses(table: pd.DataFrame, lines: int = 10) -> None:
    """A few steps of both curves, the first and the last among them."""
    few = table.iloc[sorted({round(i * (len(table) - 1) / (lines - 1)) for i in range(lines)})].astype(object)
    forms = {"theirs": "{:.6f}", "bnfast": "{:.6f}", "difference": "{:+.1e}"}
    print(as_text(few.assign(**{name: few[name].map(form.format) for name, form in forms.items()})), "\n")


def train_twice(session: Session, layer: str, epochs: int, seed: int) -> None:
    """Part one: the whole training, in fp32 as one does and in fp64, where rounding hides nothing."""
    section("1. Training a residual network on the digits, twice")
    if session.cannot("training", "sklearn"):
        return
    data, recipe = load(seed, session.device), Recipe(epochs=epochs, seed=seed)
    steps = len(batches(len(data[0]) - recipe.held, recipe))
    other = "the plain formulas, as torch.nn has none," if layer == "BatchRenorm" else f"torch.nn's {layer}"
    paragraph(
        f"The same small network, seed and batches, once with {other} and once with bnfast's {layer}. In "
        "fp32 two correct implementations drift apart by rounding alone, so only the first "
        f"{BEGINNING} steps are held to a close limit there; in fp64 the whole run is."
    )
    curves, rows, faults = {}, [], []
    for dtype, limits in FULL.items():
        name, own = NAMES[dtype], Recipe(epochs=epochs, seed=seed, dtype=dtype)
        theirs, ours = (
            train(norm, data, own, f"{name}, {label}")
            for norm, label in zip(pair(layer, steps), ("theirs", "bnfast"), strict=True)
        )
        apart = compare(theirs, ours)
        curves[name] = theirs.losses, ours.losses
        faults += [f"{name}: {fault}" for fault in beyond(apart, limits)]
        figures = {f"loss, first {BEGINNING}": "beginning", "loss, all": "losses", "parameters": "parameters"}
        row = {title: f"{apart[what]:.1e}" for title, what in figures.items()}
        row["buffers"] = f"{apart['buffers']:.1e}" if "buffers" in apart else "-"
        rows.append({"": name, **row, "theirs": f"{theirs.accuracy:.2%}", "bnfast": f"{ours.accuracy:.2%}"})
    tables = {name: step_by_step(*both) for name, both in curves.items()}
    show_losses(tables["fp32"])
    paragraph(f"Largest differences, and the share of {recipe.held} held-back images that each gets right:")
    print(as_text(pd.DataFrame(rows)))
    if session.why_plain_torch() and all(theirs == ours for theirs, ours in curves.values()):
        paragraph(
            "No difference at any step, and none to expect: without the kernels, both call one function."
        )
    whole = pd.concat(tables, names=["dtype"]).reset_index("dtype")
    whole.to_csv(session.folder / "digits-losses.csv", index=False)
    session.draw(lambda: pictures.losses(session.folder / "digits-losses.png", curves))
    good = f"bnfast's {layer} trains as the other does, within the stated limits"
    session.note("training", "FAIL" if faults else "PASS", "; ".join(faults) or good)


def train_with_kernels(session: Session, layer: str) -> None:
    """Part two: where part one ran on plain torch, a few steps of it with the kernels, in the interpreter."""
    part, why = "kernels", session.why_plain_torch()
    if why is None:
        section("2. The kernels themselves")
        state = next((state for name, state, _ in session.summary if name == "training"), "NOT RUN")
        session.note(part, state, "see the training above: it uses them, on the GPU")
        return
    section(
        "2. The first steps again, with the kernels themselves",
        f"Above, bnfast's layers ran plain torch: {why}. Here the kernels run, in Triton's interpreter, on "
        "small batches of the same images in fp32.",
    )
    if session.cannot(part, "sklearn", "triton"):
        return
    try:
        found = kernel_steps(layer)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        session.note(part, "FAIL", f"the process with the interpreter did not finish: {error}")
        return
    table, apart = step_by_step(found["theirs"], found["ours"]), found["apart"]
    show_losses(table)
    table.to_csv(session.folder / "kernels-losses.csv", index=False)
    rows = [
        [name, f"{apart[name]:.1e}", f"{limit:.0e}"] for name, limit in FEW_STEPS.items() if name in apart
    ]
    print(as_text(pd.DataFrame(rows, columns=["largest difference in", "found", "allowed"])))
    faults = kernel_faults(found)
    text = f"{found['launches']} launches in {len(table)} steps agree with torch's"
    session.note(part, "FAIL" if faults else "PASS", "; ".join(faults) or text)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Both parts, for one of LAYERS."""
    session = begin(options, lacking, f"bnfast: does its {options.layer} train like torch's?")
    train_twice(session, options.layer, options.epochs, options.seed)
    train_with_kernels(session, options.layer)
    return session.close()


if __name__ == "__main__":
    outcome = first_steps(sys.argv[2], *map(int, sys.argv[3:]))
    Path(sys.argv[1]).write_text(json.dumps(outcome), encoding="utf-8")
