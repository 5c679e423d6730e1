"""The main job: does bnfast train like torch.nn, do its kernels compute the same, and what do they cost?"""

from __future__ import annotations

import argparse

from benchmarks import LAYERS, memory, report, suite_run, tables, training
from benchmarks.session import Session, begin
from benchmarks.suites import RESNET50, SUITES

OTHERS = tuple(suite for suite in SUITES if suite != "resnet50")


def resnet(session: Session) -> None:
    """Part three: what each BatchNorm of ResNet-50 moves and launches and, on a GPU, takes."""
    report.section(f"3. {RESNET50.title(RESNET50.layout)}", suite_run.ABOUT)
    lines, rows = suite_run.in_full(session, RESNET50, RESNET50.layout)
    report.write_csv(session.folder / "resnet50.csv", tables.CSV_HEADERS, lines)
    session.note("resnet-50", "DONE", suite_run.how_many(session, rows))


def networks(session: Session) -> None:
    """Part four: the sums of other networks."""
    report.section(
        "4. Other networks",
        "The same for all layers of each network: GroupNorm, and InstanceNorm in nnU-Net; bf16, contiguous.",
    )
    suite_run.compact(session, OTHERS)
    print("Layer by layer, and in channels_last too:")
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
