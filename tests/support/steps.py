"""A quick network in ResNet-50's place, and what tests of benchmarks.step ask of its records."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from benchmarks.records import Record
from benchmarks.resnet import Task, Variant
from benchmarks.step import Effort, measure_steps

TASK = Task(torch.device("cpu"), torch.float32, width=8, classes=10, image=32)
SMALL = replace(TASK, dtype=torch.float64, width=2, image=8)  # for the network of four layers below
QUICK = Effort(rounds=3, steps=2, losses=3, orders=2)


def four_layers(classes: int, width: int) -> nn.Module:
    """For images of 8 x 8: they take no time."""
    layers = (nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(width * 36, classes))


def measured(*variants: Variant, effort: Effort = QUICK, task: Task = SMALL) -> dict[str, Record]:
    """The records of a stage at a batch of 4, by name."""
    return {line.variant: line for line in measure_steps(task, (4,), stages=(variants,), effort=effort)}
