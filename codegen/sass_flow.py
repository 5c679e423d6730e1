"""The shape of a kernel in SASS, NVIDIA's machine code: where its main loop is, and what it keeps in flight.

A kernel of this project runs through phases, and each instruction is counted in one of them:

    prologue    before the main loop; everything, where there is no loop
    main loop   the innermost loop with the widest global loads: where the time goes
    remainder   what unrolling left over: code behind the main loop that still goes on to such loads
    epilogue    from there to the first atomic: what every CTA does once
    finalizer   behind an atomic: what only the last CTA to arrive does, but for the check that it is the last

ptxas places unlikely code out of line, so phases follow from control flow and not from the order of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import networkx as nx  # PyTorch brings it

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"([.$\w]+):")
TARGET = re.compile(r"`\(([^)]+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")
WIDTHS = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


class Instruction(NamedTuple):
    """One line of SASS."""

    guard: str  # the predicate under which it is carried out, or ""
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    def __str__(self) -> str:
        return f"{self.guard}{self.opcode} {self.operands}".rstrip()

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes a thread moves, for an instruction that accesses memory."""
        return next((width for mark, width in WIDTHS.items() if mark in self.opcode), 4)

    @property
    def loads(self) -> bool:
        """Whether this loads from global memory into registers. No kernel copies into shared memory."""
        return self.name == "LDG"


class Phases(NamedTuple):
    """The instructions of each phase, in the order of the text."""

    prologue: tuple[Instruction, ...]
    main_loop: tuple[Instruction, ...]
    remainder: tuple[Instruction, ...]
    epilogue: tuple[Instruction, ...]
    finalizer: tuple[Instruction, ...]
    repeated: tuple[Instruction, ...]  # the part of the epilogue inside loops, which runs more than once


class Code:
    """A kernel printed by `nvdisasm -c`: its instructions, and `flow`, the graph of those that are reached,
    by number, with an edge to each that may come next. The entry is number 0."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                self._labels[label[1]] = len(self.instructions)
            elif found := LINE.search(line):
                self.instructions.append(Instruction(*found.groups("")))
        self.flow = nx.DiGraph(self._edges())
        self.flow.remove_nodes_from(set(self.flow) - _reachable(self.flow, [0]))

    def _edges(self) -> Iterator[tuple[int, int]]:
        barriers: dict[str, int | None] = {}
        for number, instruction in enumerate(self.instructions):
            found = TARGET.search(instruction.operands)
            target, goes_on = self._labels.get(found[1]) if found else None, True
            match instruction.name:
                case "EXIT" | "RET":
                    target, goes_on = None, bool(instruction.guard)
                case "BRA" if ".DIV" in instruction.opcode:
                    # It leaves to emulate a shuffle in a diverged warp, which programs of Triton never are.
                    target = None
                case "BRA":
                    goes_on = bool(instruction.guard) or not instruction.operands.startswith("`")
                case "BSSY":
                    barriers[instruction.operands.partition(",")[0]], target = target, None
                case "BSYNC":  # goes to where the last BSSY with this barrier said
                    target, goes_on = barriers[instruction.operands], False
            if target is not None:
                yield number, target
            if goes_on:
                yield number, number + 1

    @property
    def bytes_in_flight(self) -> int:
        """The most bytes a thread waits for at a time, in a turn of the main loop if there is one: no kernel
        loads in one turn what it uses in the next."""
        return bytes_in_flight(self.phases.main_loop or self.phases.prologue)

    @cached_property
    def phases(self) -> Phases:
        code, flow = self.instructions, self.flow
        loads = {i for i in flow if code[i].loads}

        def after(some: Iterable[int]) -> set[int]:
            return _reachable(flow, {to for i in some for to in flow[i]})

        def widths(loop: set[int]) -> tuple[int, int]:
            wide = [code[i].width for i in loop & loads]
            return max(wide), sum(wide)

        final = after(i for i in flow if code[i].name in ("ATOM", "ATOMG"))
        loops = [*_loops(flow)]
        # A persistent kernel comes back to its data loop behind an atomic; else loops there merge partials.
        loading = [loop for loop in [loop for loop in loops if not loop & final] or loops if loop & loads]
        innermost = [loop for loop in loading if not any(other < loop for other in loading)]
        main = max(innermost, key=widths, default=set())
        final -= main
        behind = after(main) - main - final
        streaming = {code[i].opcode for i in main & loads}
        streams = {i for i in behind & loads if code[i].opcode in streaming}
        remainder = _reachable(nx.reverse_view(flow.subgraph(behind)), streams)
        epilogue = behind - remainder
        repeated = {i for loop in loops if loop <= epilogue for i in loop}
        phases = set(flow) - main - behind - final, main, remainder, epilogue, final, repeated
        return Phases(*(tuple(code[i] for i in sorted(phase)) for phase in phases))


def _reachable(graph: Any, entries: Iterable[int]) -> set[int]:
    return set(chain(*nx.bfs_layers(graph, entries)))


def _loops(flow: Any, outer: Any = None) -> Iterator[set[int]]:
    """The natural loops. ptxas emits reducible code: a loop is entered at its head alone, and what is a cycle
    without the head is a loop within."""
    for body in nx.strongly_connected_components(flow):
        if len(body) > 1:
            yield body
            heads = {i for i in body if i == 0 or not body.issuperset((outer or flow).pred[i])}
            yield from _loops(flow.subgraph(body - heads).copy(), outer or flow)


def bytes_in_flight(instructions: Iterable[Instruction]) -> int:
    """The most bytes a thread has requested from global memory and not yet waited for.

    A thread issues in order and stops at the first use of a register that is still to be loaded: loads are in
    flight together as long as none of them is used."""
    filler: dict[int, int] = {}  # register -> the load that fills it
    loads: dict[int, int] = {}  # load -> bytes
    most = 0
    for number, instruction in enumerate(instructions):
        destinations, _, _ = instruction.operands.partition("[")
        filled = [int(r) for r in REGISTER.findall(destinations)] if instruction.loads else []
        registers = {
            first + i for first in filled for i in range(max(1, instruction.width // 4 // len(filled)))
        }
        for register in registers.union(map(int, REGISTER.findall(instruction.operands))):
            loads.pop(filler.get(register, -1), None)
        if registers:
            loads[number] = instruction.width
            filler |= dict.fromkeys(registers, number)
        most = max(most, sum(loads.values()))
    return most
