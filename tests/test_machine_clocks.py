"""What a GPU says of itself, and what is made of an answer that is missing."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest
import torch

from benchmarks.machine import clocks

CPU = torch.device("cpu")
ANSWER = "NVIDIA H200, 570.86.15, 1980, 3201, 35, 119.52\n"


def answering(text: str) -> clocks.Ask:
    return lambda command, seconds: text


def test_clocks_are_read() -> None:
    found = clocks.read(CPU, answering(ANSWER))
    assert found == clocks.Clocks("NVIDIA H200", "570.86.15", 1980.0, 3201.0, 35.0, 119.52)
    (line,) = clocks.clocks(CPU, ask=answering(ANSWER))
    assert (line.status, line.gpu, line.driver) == ("measured", "NVIDIA H200", "570.86.15")
    assert (line.clock_MHz, line.temperature_C) == (1980.0, 35.0)
    assert line.note == "memory clock 3201 MHz, power 119.52 W"


def test_what_the_gpu_does_not_tell_is_none() -> None:
    found = clocks.read(CPU, answering("[N/A], 570.86.15, [Not Supported], 3201, [N/A], [Unknown Error]\n"))
    assert found == clocks.Clocks(driver="570.86.15", memory_MHz=3201.0)


@pytest.mark.parametrize(
    "error", [FileNotFoundError, subprocess.TimeoutExpired, subprocess.CalledProcessError]
)
def test_no_answer_is_no_error(error: type[Exception]) -> None:
    def ask(command: Sequence[str], seconds: float) -> str:
        raise error(1, "nvidia-smi")

    assert clocks.read(CPU, ask) == clocks.Clocks()
    (line,) = clocks.clocks(CPU, ask=ask)
    assert (line.status, line.clock_MHz, line.temperature_C) == ("cannot", None, None)


@pytest.mark.parametrize("text", ["", "No devices were found\n", ANSWER * 2])
def test_an_answer_of_another_form_tells_nothing(text: str) -> None:
    assert clocks.read(CPU, answering(text)) == clocks.Clocks()


def test_the_question_has_a_time_limit() -> None:
    asked: list[tuple[Sequence[str], float]] = []
    list(clocks.clocks(CPU, 3.0, lambda command, seconds: asked.append((command, seconds)) or ANSWER))
    ((command, seconds),) = asked
    assert seconds == 3.0
    assert command[0] == "nvidia-smi"
    assert "clocks.sm" in command[1]
