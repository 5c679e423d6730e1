"""PTX as the executor takes it: a table of instructions whose operands are numbered registers.

Constants are registers too, which hold them from the start. An instruction that is not known is an error when
the program is made, so that nothing unknown is executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from .library import HERE

INSTRUCTION = np.dtype(
    [
        ("op", "i4"), ("guard", "i4"), ("to", "i4", 8), ("from", "i4", 8), ("offset", "i8"), ("size", "i4"),
        ("count", "i4"), ("flag", "i4"), ("compare", "i4"), ("target", "i4"), ("line", "i4"),
        ("place", "i4"),
    ],
    align=True,
)  # fmt: skip
LANES = 32
_TABLE = re.findall(r'^OP\((\w+), "([^"]*)"', (HERE / "opcodes.h").read_text(), re.MULTILINE)
# in the order of the enumeration in executor.c
_OTHERS = (
    "branch", "exit", "barrier", "warp_sync", "parameter", "load", "store", "load_shared", "store_shared",
    "load_matrix", "store_matrix", "atomic_add", "shuffle_xor", "shuffle_index", "reduce_add",
    "unpack16", "unpack32",
)  # fmt: skip
CODES = {name: code for code, name in enumerate([*(name for name, _ in _TABLE), *_OTHERS])}
_SPELLED = {spelling: name for name, spellings in _TABLE for spelling in spellings.split()}
_COMPARISONS = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5, "nan": 6, "num": 7}
_COMPARISONS |= {"lo": 2, "ls": 3, "hi": 4, "hs": 5}  # of unsigned numbers
_UNORDERED = 16
_SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x")  # the first registers
_IGNORED = (".reg", ".file", ".pragma", "$L__tmp")


class UnknownInstruction(NotImplementedError):
    """The executor does not have this instruction of PTX."""


class Program:
    """The instructions of a kernel.

    Args:
        text: The PTX of a module with one kernel.

    Raises:
        UnknownInstruction: The kernel has an instruction that the executor lacks."""

    def __init__(self, text: str) -> None:
        self.registers = {name: number for number, name in enumerate(_SPECIAL)}
        self._constants: dict[int, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._labels: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._place = 0  # in the source; 0 where the module does not say
        threads = re.search(r"\.reqntid\s+(\d+)", text)
        if threads is None:
            raise UnknownInstruction("a kernel of Triton's has .reqntid, the number of its threads")
        self.warps = int(threads[1]) // LANES
        for line, statement in self._statements(text):
            self._add(statement, line)
        self.code: np.ndarray = np.zeros(len(self._rows), INSTRUCTION)
        self.code["to"] = self.code["from"] = self.code["guard"] = -1
        for row, instruction in zip(self._rows, self.code, strict=True):
            if "target" in row:
                row["target"] = self._labels[row["target"]]
            for field, value in row.items():
                if field in ("to", "from"):
                    instruction[field][: len(value)] = value
                else:
                    instruction[field] = value
        # what no instruction has given a register is anybody's guess
        generator = np.random.default_rng(7)
        self.initial = generator.integers(
            0, 2**63, (len(self.registers) + len(self._constants), LANES), np.uint64
        )
        for value, number in self._constants.items():
            self.initial[number] = value
        narrowest = [row["size"] for row in self._rows if row["op"] in _SHARED]
        # bytes of shared memory that are watched together
        self.shared_step = min([*narrowest, 2 if any(row["op"] in _MATRICES for row in self._rows) else 4, 4])

    def _statements(self, text: str) -> Iterator[tuple[int, str]]:
        """(line, instruction) of the kernel's body; labels are noted."""
        begin = text.index("{", text.index(".reqntid")) + 1
        first, pending = 0, ""
        for number, line in enumerate(text[begin:].splitlines(), text.count("\n", 0, begin) + 1):
            line = line.partition("//")[0].strip()
            if line.startswith(".section"):
                return
            while label := re.match(r"(\$\w+):\s*(.*)", line):
                self._labels[label[1]], line = len(self._rows), label[2]
            if inner := re.match(r"\{\s*\.reg \.b32 tmp;\s*(.*?;)\s*\}", line):
                line = inner[1]
            if line.startswith(".loc"):
                self._place = self._places.setdefault(line, len(self._places) + 1)
                continue
            if not line or line in "{}" or line.startswith(_IGNORED):
                continue
            first = first if pending else number
            pending = f"{pending} {line}".strip()
            if pending.endswith(";"):
                yield first, pending[:-1].strip()
                pending = ""

    def _register(self, operand: str) -> int:
        """Of a register's name, or of a constant; -1 where the value is dropped."""
        if operand in ("_", "tmp"):
            return -1
        free = len(self.registers) + len(self._constants)
        if operand.startswith("%"):
            return self.registers.setdefault(operand, free)
        if operand == "global_smem":  # shared memory begins at 0
            value = 0
        elif operand[:2] in ("0f", "0F", "0d", "0D"):
            value = int(operand[2:], 16)
        else:
            value = int(operand.rstrip("U"), 0) % 2**64
        return self._constants.setdefault(value, free)

    def _several(self, operand: str) -> list[int]:
        return [self._register(name.strip()) for name in operand.strip("{} ").split(",")]

    def _address(self, operand: str) -> dict[str, Any]:
        found = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise ValueError
        return {"from": [self._register(found[1])], "offset": int(found[2] or 0)}

    def _add(self, statement: str, line: int) -> None:
        row: dict[str, Any] = {"line": line, "place": self._place}
        if guarded := re.match(r"@(!?)(%p\d+)\s+(.*)", statement, re.DOTALL):
            row["guard"] = 2 * self._register(guarded[2]) + (guarded[1] == "!")
            statement = guarded[3]
        opcode, *rest = statement.split(None, 1)
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest[0] if rest else "")
        try:
            name, fields = self._decode(opcode, operands)
            self._rows.append({**row, "op": CODES[name], **fields})
        except (KeyError, IndexError, ValueError):
            raise UnknownInstruction(f"line {line}: {statement}") from None

    def _decode(self, opcode: str, operands: list[str]) -> tuple[str, dict[str, Any]]:
        """The instruction's name, and its fields."""
        kind, *modifiers = opcode.split(".")
        braces = [operand.startswith("{") for operand in operands]
        if kind == "mov" and any(braces):
            width = "16" if modifiers[0] == "b32" else "32"
            if braces[0]:
                return f"unpack{width}", {
                    "to": self._several(operands[0]),
                    "from": [self._register(operands[1])],
                }
            return f"pack{width}", {"to": [self._register(operands[0])], "from": self._several(operands[1])}
        if opcode in _SPELLED:
            to, *sources = (self._register(operand) for operand in operands)
            return _SPELLED[opcode], {"to": [to], "from": sources}
        if kind == "setp":
            return self._comparison(modifiers, operands)
        if kind in ("ld", "st", "ldmatrix", "stmatrix"):
            return self._access(kind, modifiers, operands)
        if kind == "atom":
            if modifiers[0] != "global" or modifiers[-2:] not in (["add", "u32"], ["add", "s32"]):
                raise ValueError
            address = self._address(operands[1])
            address["from"].append(self._register(operands[2]))
            synchronizes = "acq_rel" in modifiers and "gpu" in modifiers
            return "atomic_add", {"to": [self._register(operands[0])], "flag": synchronizes, **address}
        if kind == "shfl":
            if operands[3:] not in (["31", "-1"], ["31", "0xffffffff"]):
                raise ValueError
            name = {"bfly": "shuffle_xor", "idx": "shuffle_index"}[modifiers[1]]
            return name, {
                "to": [self._register(operands[0])],
                "from": [self._register(o) for o in operands[1:3]],
            }
        if opcode in ("redux.sync.add.s32", "redux.sync.add.u32"):
            return "reduce_add", {
                "to": [self._register(operands[0])],
                "from": [self._register(o) for o in operands[1:]],
            }
        if kind == "createpolicy":  # a hint, which the executor's loads and stores do not look at
            return "move", {"to": [self._register(operands[0])], "from": [self._register("0")]}
        if kind == "bra":
            return "branch", {"target": operands[0]}
        names = {
            "ret": "exit",
            "bar.sync": "barrier",
            "barrier.sync": "barrier",
            "bar.warp.sync": "warp_sync",
        }
        return names[opcode], {}

    def _comparison(self, modifiers: list[str], operands: list[str]) -> tuple[str, dict[str, Any]]:
        comparison, kind = modifiers[0], modifiers[-1].replace("b", "u")
        compare = _COMPARISONS.get(comparison)
        if compare is None or kind[0] == "f" and comparison[-1] == "u":  # such as ltu: true of NaN too
            compare = _COMPARISONS[comparison[:-1]] + _UNORDERED
        to, *sources = (self._register(operand) for operand in operands)
        return f"set_{kind}", {"to": [to], "from": sources, "compare": compare}

    def _access(self, kind: str, modifiers: list[str], operands: list[str]) -> tuple[str, dict[str, Any]]:
        name = "load" if kind.startswith("ld") else "store"
        values, address = operands[:2] if name == "load" else operands[1::-1]
        if modifiers[0] == "param":
            parameter = re.search(r"_param_(\d+)", address)
            assert parameter is not None
            size = int(modifiers[-1][1:]) // 8
            return "parameter", {"to": [self._register(values)], "offset": int(parameter[1]), "size": size}
        to = self._several(values)
        fields = {"to": to, "count": len(to), **self._address(address)}
        if kind.endswith("matrix"):
            if "m8n8" not in modifiers or modifiers[-1] != "b16":
                raise ValueError
            return f"{name}_matrix", {**fields, "size": 2, "flag": "trans" in modifiers}
        space = {"global": "", "shared": "_shared"}[modifiers[0].partition("::")[0]]
        width = re.fullmatch(r"[bfus](\d+)", modifiers[-1])
        assert width is not None
        return name + space, {**fields, "size": int(width[1]) // 8}


_SHARED = (CODES["load_shared"], CODES["store_shared"])
_MATRICES = (CODES["load_matrix"], CODES["store_matrix"])
