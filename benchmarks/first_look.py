"""The main job: does bnfast train like torch.nn, do its kernels compute the same, and what do they cost?"""

from __future__ import annotations

import argparse

import pandas as pd
import torch

from benchmarks import digits, layers, memory, predict, records, tables
from benchmarks.cases import of_network
from benchmarks.session import Session, as_text, begin, section
from benchmarks.suites import RESNET50, SUITES

SHOWN = tuple(suite for suite in SUITES if suite not in ("resnet50", "small"))
OTHERS = [(suite, network) for suite in SHOWN for network in SUITES[suite]]


def resnet(session: Session) -> None:
    """Part three: what each BatchNorm of ResNet-50 moves and launches and, on a GPU, takes."""
    section("3. Every layer of a network", layers.explained(session))
    file = session.folder / "layers.csv"
    timing = layers.Run(session, layers.QUICK, ["torch"], file) if session.gpu else None
    choice = ("resnet50", RESNET50, torch.bfloat16, RESNET50.layout)
    found = layers.of_choice(session, timing, choice)
    session.note("resnet-50", "DONE", layers.summary(session, found))


def networks(session: Session) -> None:
    """Part four: the sums of other networks."""
    section(
        "4. Other networks",
        "Predicted for all layers of each network together: GroupNorm, and InstanceNorm in nnU-Net; bf16.",
    )
    rows = []
    for suite, network in OTHERS:
        todo = of_network(suite, network, torch.bfloat16, network.layout == "channels_last")
        found = list(predict.records(todo, compiled=False))
        records.append(session.folder / "predicted.csv", found)
        total = tables.predicted(records.frame(found)).tail(1)
        total = total.rename(columns={"C x size": "network"}).drop(columns="modelled us")
        rows.append(total.assign(network=network.name))
    print(as_text(pd.concat(rows)))
    session.note("networks", "DONE", "predicted")
    print("Layer by layer, with what the compiled kernels do:")
    print(f"    python3 -m benchmarks run --suite {'|'.join(SHOWN)}|all [--layout both]")


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """All parts. Returns 1 if anything disagreed, else 0; a part that could not run is only named."""
    session = begin(options, lacking, "bnfast, a first look: does it train like torch.nn, what does it move?")
    digits.train_twice(session, options.layer, options.epochs)
    digits.train_with_kernels(session, options.layer)
    resnet(session)
    networks(session)
    memory.show(session, "5. Memory")
    return session.close()
