"""A small residual network on scikit-learn's bundled digits, trained with torch.nn's layer and with bnfast's,
to see that they agree: the first look begins with it.

Two correct implementations round differently, and training magnifies it: once a ReLU's input falls to
different sides of zero, the curves part. In fp32 that happens within a hundred steps, so only the
beginning can be held to a close limit there; in fp64 nothing of it is seen, and the whole run is.

Without a GPU bnfast runs plain torch, so the first steps run again with the kernels themselves, compiled for
a GPU and executed on the CPU: slow, but it is their own code on real activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

import bnfast
from benchmarks import pictures
from benchmarks.resnet import Bottleneck, Norm
from benchmarks.session import Session, as_text, paragraph, progress, section
from benchmarks.timing import one_line, one_thread
from codegen.cases import DTYPES

BEGINNING = 8  # steps
# What two runs may differ by: losses and accuracy outright, tensors in norm and relative to the first run's.
# fp32: the later limits only catch a curve that goes another way altogether. kernels: a few steps on small
# batches in fp32, too short for rounding to grow.
LIMITS = {
    "fp32": {"beginning": 1e-4, "losses": 0.5, "gradients": 1e-4, "accuracy": 0.03},
    "fp64": {
        "beginning": 1e-11, "losses": 1e-8, "gradients": 1e-10, "parameters": 1e-7, "buffers": 1e-7,
        "accuracy": 0.003,
    },
    "kernels": {"losses": 1e-5, "gradients": 1e-4, "parameters": 1e-4, "buffers": 1e-4},
}  # fmt: skip
# torch.nn's layer and bnfast's, for each of LAYERS
PAIRS: dict[str, tuple[Norm, Norm]] = {
    "BatchNorm": (nn.BatchNorm2d, bnfast.BatchNorm2d),
    "GroupNorm": (partial(nn.GroupNorm, 4), partial(bnfast.GroupNorm, 4)),
    "InstanceNorm": (partial(nn.InstanceNorm2d, affine=True), partial(bnfast.InstanceNorm2d, affine=True)),
}


def network(norm: Norm, width: int) -> nn.Module:
    """A stem, a residual block (8x8 to 4x4), average pooling and ten outputs: five norms. Not down to 2x2,
    where an InstanceNorm of four values magnifies rounding until even fp64 runs part."""
    stem = (nn.Conv2d(1, width, 3, 1, 1, bias=False), norm(width), nn.ReLU())
    block = Bottleneck(width, width // 2, 2, nn.ReLU, norm)
    return nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


@dataclass(frozen=True)
class Run:
    """What a training run left behind. tensors: gradients, of the first step; parameters and buffers, of the
    end; each by their names in the network."""

    losses: list[float]
    accuracy: float
    tensors: dict[str, dict[str, Tensor]]


def train(
    norm: Norm, device: torch.device, label: str = "training", epochs: int = 6, batch: int = 64,
    width: int = 32, dtype: torch.dtype = torch.float32, steps: int | None = None, held: int = 359,
) -> Run:  # fmt: skip
    """Trains from scratch on 8x8 grey images of handwritten digits, at most so many steps; `held` images are
    held back, to test with. Batches are shuffled anew each epoch; a last short one is left out. The learning
    rate falls to nearly zero, so that runs in fp32, whose curves part, still end equally good."""
    from sklearn.datasets import load_digits  # it may not be installed

    generator = torch.Generator().manual_seed(0)
    pixels, digits = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(digits), generator=generator)
    images, labels = pixels[order].view(-1, 1, 8, 8).to(device, dtype) / 16, digits[order].to(device)
    orders = [torch.randperm(len(images) - held, generator=generator) for _ in range(epochs)]
    batches = [rows for order in orders for rows in order.split(batch) if len(rows) == batch][:steps]
    torch.manual_seed(0)
    model = network(norm, width).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, len(batches))
    losses, gradients = list[float](), dict[str, Tensor]()
    # so that only the normalization may differ
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with exact, one_thread():
        for rows in progress(batches, desc=label):
            rows = rows.to(device) + held
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            if not losses:
                gradients = {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        model.eval()  # with the running statistics
        with torch.no_grad():
            right = model(images[:held]).argmax(1) == labels[:held]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tensors = {"gradients": gradients, "parameters": parameters, "buffers": dict(model.named_buffers())}
    return Run(losses, float(right.double().mean()), tensors)


def largest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest distance of two tensors of a name, relative to the first; NaN if any is."""
    norm = torch.linalg.vector_norm
    apart = [norm(a.double() - second[name].double()) / norm(a.double()) for name, a in first.items()]
    return float(torch.stack(apart).max()) if apart else 0.0


def compare(first: Run, second: Run, limits: str) -> pd.DataFrame:
    """A line for each difference that is limited; `wrong` if it is beyond, or NaN."""
    losses = torch.tensor([first.losses, second.losses], dtype=torch.float64).diff(dim=0).abs()
    found = {
        "beginning": float(losses[:, :BEGINNING].max()), "losses": float(losses.max()),
        "accuracy": abs(first.accuracy - second.accuracy),
        **{name: largest(own, second.tensors[name]) for name, own in first.tensors.items()},
    }  # fmt: skip
    lines = [(what, limits, found[what], limit) for what, limit in LIMITS[limits].items()]
    table = pd.DataFrame(lines, columns=["largest difference", "in", "found", "allowed"])
    return table.assign(wrong=~(table["found"] <= table["allowed"]))


# the kernels, executed


def kernel_steps(layer: str, steps: int = 3, batch: int = 8, width: int = 8) -> tuple[Run, Run, int, int]:
    """Both runs; how many kernels were launched, lest a comparison of torch with torch pass for one; and in
    how many calls of a layer."""
    from bnfast.ptx import executing  # needs Triton

    theirs, ours = PAIRS[layer]
    how = partial(train, device=torch.device("cpu"), batch=batch, width=width, steps=steps, held=batch)
    plain = how(theirs)
    with executing() as launched:
        run = how(ours, label="steps with compiled kernels")
    layers = sum(type(m) is type(ours(width)) for m in network(ours, width).modules())
    return plain, run, len(launched), layers * (2 * steps + 1)  # forward and backward, and once in eval


# the job


def show(session: Session, file: str, runs: dict[str, tuple[Run, Run]]) -> str:
    """A few steps of the first pair's curves, and the largest differences of each; all curves go to a file.
    Returns what lies too far apart."""
    curves = pd.concat(
        pd.DataFrame({"dtype": name, "torch.nn": theirs.losses, "bnfast": ours.losses}).rename_axis("step")
        for name, (theirs, ours) in runs.items()
    ).reset_index()
    curves["step"] += 1
    curves["difference"] = curves["bnfast"] - curves["torch.nn"]
    curves.to_csv(session.folder / file, index=False)
    first = curves[curves["dtype"] == next(iter(runs))].drop(columns="dtype")
    few = first.iloc[:: max(1, len(first) // 9)]
    forms = {"torch.nn": "{:.6f}".format, "bnfast": "{:.6f}".format, "difference": "{:+.1e}".format}
    print(few.to_string(index=False, formatters=forms), end="\n\n")
    table = pd.concat(compare(*both, name) for name, both in runs.items())
    cells = table[["found", "allowed"]].map("{:.1e}".format)
    print(as_text(table.assign(**cells).drop(columns="wrong")), flush=True)
    return ", ".join((table["in"] + " " + table["largest difference"])[table["wrong"]])


def train_twice(session: Session, layer: str, epochs: int) -> None:
    """Part one: the whole training, in fp32 as one does and in fp64, where rounding hides nothing."""
    section(
        "1. Training a residual network on the digits, twice",
        f"The same small network, seed and batches, once with torch.nn's {layer} and once with bnfast's. In "
        "fp32 two correct implementations drift apart by rounding alone, so only the beginning "
        f"({BEGINNING} steps) is held to a close limit there; in fp64 the whole run is.",
    )
    if session.cannot("training", "sklearn"):
        return
    runs = {}
    for name in ("fp32", "fp64"):
        how = partial(train, device=session.device, epochs=epochs, dtype=DTYPES[name])
        theirs, ours = PAIRS[layer]
        runs[name] = how(theirs, label=f"{name}, torch.nn"), how(ours, label=f"{name}, bnfast")
    file = session.folder / "digits-losses.csv"
    wrong = show(session, file.name, runs)
    right = [f"{name} {a.accuracy:.2%} and {b.accuracy:.2%}" for name, (a, b) in runs.items()]
    paragraph(f"Held-back images that torch.nn's and bnfast's get right: {', '.join(right)}.")
    session.draw(lambda: pictures.losses(file.with_suffix(".png"), pd.read_csv(file)))
    good = f"bnfast's {layer} trains as torch.nn's does, within the stated limits"
    session.note("training", "FAIL" if wrong else "PASS", f"beyond the limits: {wrong}" if wrong else good)


def train_with_kernels(session: Session, layer: str) -> None:
    """Part two: where part one ran on plain torch, a few steps of it with the compiled kernels."""
    why = session.why_plain_torch()
    if why is None:
        return
    section(
        "2. The first steps again, with the kernels themselves",
        f"Above, bnfast's layers ran plain torch: {why}. Here the kernels run as compiled for an "
        "H200, executed on the CPU, on small batches of the same images in fp32.",
    )
    if session.cannot("kernels", "sklearn", "triton"):
        return
    try:
        theirs, ours, launches, calls = kernel_steps(layer)
    except Exception as error:
        session.note("kernels", "FAIL", f"the steps did not finish: {one_line(error)}")
        return
    wrong = show(session, "kernels-losses.csv", {"kernels": (theirs, ours)})
    text = f"{launches} launches in {calls} calls of a layer" + ", fewer than one each" * (launches < calls)
    text += f", beyond the limits: {wrong}" if wrong else ", and all agrees with torch's"
    session.note("kernels", "FAIL" if wrong or launches < calls else "PASS", text)
