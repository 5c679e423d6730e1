"""The main job: does bnfast train like torch.nn, do its kernels compute the same, and what do they cost?"""

from __future__ import annotations

import argparse

import torch

from benchmarks import LAYERS, cases, layers, memory, predict, records, report, tables, training
from benchmarks.session import Session, begin
from benchmarks.suites import RESNET50, SUITES

OTHERS = tuple(suite for suite in SUITES if suite not in ("resnet50", "small"))


def resnet(session: Session) -> None:
    """Part three: what each BatchNorm of ResNet-50 moves and launches and, on a GPU, takes."""
    about = layers.COUNTED + (f" {layers.HOW}" if session.gpu else "")
    report.section("3. Every layer of a network", about)
    file = session.folder / "layers.csv"
    timing = layers.Run(session, layers.QUICK, ["torch"], file) if session.gpu else None
    what = ("resnet50", RESNET50, torch.bfloat16, RESNET50.layout)
    found = layers.of_network(session, timing, *what, compiled=False)
    session.note("resnet-50", "DONE", layers.summary(session, found))


def networks(session: Session) -> None:
    """Part four: the sums of other networks."""
    report.section(
        "4. Other networks",
        "Predicted for all layers of each network together: GroupNorm, and InstanceNorm in nnU-Net; bf16.",
    )
    rows: list[list[str]] = []
    for suite in OTHERS:
        for network in SUITES[suite]:
            todo = cases.of_network(suite, network, torch.bfloat16, network.layout == "channels_last")
            found = list(predict.records(todo, compiled=False))
            records.append(session.folder / "predicted.csv", found)
            headers, every = tables.predicted(found)
            rows.append([network.name, *every[-1][1:]])
    print(report.table(("network", *headers[1:]), rows))
    session.note("networks", "DONE", "predicted")
    print("Layer by layer, with registers and bytes in flight:")
    print(f"    python3 -m benchmarks run --suite {'|'.join(OTHERS)}|all [--layout both]")


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """All parts. Returns 1 if anything disagreed, else 0; a part that could not run is only named."""
    title = "bnfast, a first look: does it train like torch.nn, do its kernels agree, what do they move?"
    session = begin(options, lacking, title)
    layer = LAYERS[0]
    training.train_twice(session, layer, options.epochs, options.seed)
    training.kernels(session, layer)
    resnet(session)
    networks(session)
    memory.show(session, "5. Memory")
    return session.close()
