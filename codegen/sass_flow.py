"""The shape of a kernel in SASS, NVIDIA's machine code: where its main loop is, and what it keeps in flight.

A kernel of this project runs through phases, and each instruction is counted in one of them:

    prologue    before the main loop; everything, where there is no loop
    main loop   the innermost loop with the widest global loads: where the time goes
    remainder   what unrolling left over: code behind the main loop that still goes on to such loads
    epilogue    from there to the first atomic: what every CTA does once
    finaliser   behind an atomic: what only the last CTA to arrive does, but for the check that it is the last

ptxas places unlikely code out of line, so phases follow from control flow and not from the order of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import networkx as nx  # PyTorch brings it

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^([.$\w]+):", re.MULTILINE)
TARGET = re.compile(r"`\(([^)]+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")
WIDTHS = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


class Instruction(NamedTuple):
    """One line of SASS."""

    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    guarded: bool  # carried out under a predicate

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

    @property
    def is_atomic(self) -> bool:
        return self.name in ("ATOMG", "ATOM")


class Block(NamedTuple):
    """Instructions that always run together."""

    instructions: tuple[Instruction, ...]
    successors: frozenset[int]  # indices of blocks


class Phases(NamedTuple):
    """The instructions of each phase, in the order of the text."""

    prologue: tuple[Instruction, ...]
    main_loop: tuple[Instruction, ...]
    remainder: tuple[Instruction, ...]
    epilogue: tuple[Instruction, ...]
    finaliser: tuple[Instruction, ...]
    repeated: tuple[Instruction, ...]  # the part of the epilogue inside loops, which runs more than once


def parse(text: str) -> list[Block]:
    """The control flow graph of a kernel printed by `nvdisasm -c`. The entry is block 0."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := LINE.search(line):
            instructions.append(Instruction(found[2], found[3], bool(found[1])))
    exits = [_exits(instructions, i, labels) for i in range(len(instructions))]
    # Blocks end where control may leave, and behind atomics, where the finaliser begins.
    starts = {0, *labels.values()}
    for i, instruction in enumerate(instructions):
        if exits[i] != {i + 1} or instruction.is_atomic:
            starts |= {i + 1, *exits[i]}
    bounds = sorted(start for start in starts if start < len(instructions))
    number = {start: n for n, start in enumerate(bounds)}
    return [
        Block(tuple(instructions[start:stop]), frozenset(number[i] for i in exits[stop - 1] if i in number))
        for start, stop in zip(bounds, [*bounds[1:], len(instructions)], strict=True)
    ]


def _exits(instructions: list[Instruction], index: int, labels: dict[str, int]) -> set[int]:
    """Where control may go from an instruction, as indices of instructions."""
    instruction, following = instructions[index], index + 1
    target = TARGET.search(instruction.operands)
    if instruction.name in ("EXIT", "RET"):
        return {following} if instruction.guarded else set()
    if instruction.name == "BRA" and target and ".DIV" not in instruction.opcode:
        # BRA.DIV leaves to emulate a shuffle in a diverged warp, which programs of Triton never are.
        always = not instruction.guarded and instruction.operands.startswith("`")
        return {labels[target[1]]} if always else {labels[target[1]], following}
    if instruction.name == "CALL" and target:
        return {labels[target[1]], following}
    if instruction.name == "BSYNC":  # goes to where the last BSSY with this barrier said
        barrier = f"{instruction.operands}, "
        entries = (ins for ins in instructions[index::-1] if ins.name == "BSSY")
        entry = next(ins for ins in entries if ins.operands.startswith(barrier))
        target = TARGET.search(entry.operands)
        assert target is not None, entry
        return {labels[target[1]]}
    return {following}


def phases(blocks: list[Block]) -> Phases:
    """Which instructions belong to which phase."""
    graph = nx.DiGraph([(i, to) for i, block in enumerate(blocks) for to in block.successors])
    graph.add_nodes_from(range(len(blocks)))

    def reachable(*entries: int) -> set[int]:
        return set(entries).union(*(nx.descendants(graph, entry) for entry in entries))

    def gather(chosen: Iterable[int]) -> tuple[Instruction, ...]:
        return tuple(ins for i in sorted(chosen) for ins in blocks[i].instructions)

    def successors(chosen: Iterable[int]) -> set[int]:
        return {to for i in chosen for to in blocks[i].successors}

    everything = reachable(0)
    final = reachable(*successors(i for i in everything if blocks[i].instructions[-1].is_atomic))
    loops = _loops(graph)
    # A persistent kernel comes back to its data loop behind an atomic; otherwise loops there merge partials.
    main = _main_loop(blocks, [loop for loop in loops if not loop & final] or loops)
    final -= main
    behind = reachable(*successors(main)) - main - final
    streaming = {ins.opcode for ins in gather(main) if ins.loads}
    streams = {i for i in behind if streaming & {ins.opcode for ins in blocks[i].instructions}}
    remainder = streams.union(*(nx.ancestors(graph.subgraph(behind), i) for i in streams))
    epilogue = behind - remainder
    return Phases(
        gather(everything - main - behind - final),
        gather(main),
        gather(remainder),
        gather(epilogue),
        gather(final),
        gather(set().union(*(loop for loop in loops if loop <= epilogue))),
    )


def _loops(graph: Any) -> list[frozenset[int]]:
    """The natural loops. ptxas emits reducible code, where an edge to a block being visited closes a loop."""
    visited: set[int] = set()
    under_way: set[int] = set()
    bodies: dict[int, set[int]] = {}
    closing: list[tuple[int, int]] = []
    for block, following, kind in nx.dfs_labeled_edges(graph, 0):
        if kind == "forward":
            visited.add(following)
            under_way.add(following)
        elif kind == "reverse":
            under_way.remove(following)
        elif following in under_way:
            closing.append((block, following))
    for last, head in closing:
        body = bodies.setdefault(head, {head})
        if last != head:
            body |= {last} | nx.ancestors(graph.subgraph(visited - {head}), last)
    return [frozenset(body) for body in bodies.values()]


def _main_loop(blocks: list[Block], loops: list[frozenset[int]]) -> set[int]:
    widths = {
        loop: [ins.width for i in loop for ins in blocks[i].instructions if ins.loads] for loop in loops
    }
    loading = [loop for loop in loops if widths[loop]]
    innermost = [loop for loop in loading if not any(other < loop for other in loading)]
    return set(max(innermost, key=lambda loop: (max(widths[loop]), sum(widths[loop])), default=()))


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
