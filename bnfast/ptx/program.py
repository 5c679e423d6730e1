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
_TEXT = re.sub("//.*", "", (HERE / "opcodes.h").read_text())
_TABLE = re.findall(r'^OP\((\w+), "([^"]*)",(.*?)(?=^OP|\Z)', _TEXT, re.MULTILINE | re.DOTALL)
# in the order of the enumeration in executor.c
_OTHERS = (
    "branch", "exit", "barrier", "warp_sync", "parameter", "load", "store", "load_shared", "store_shared",
    "load_matrix", "store_matrix", "atomic_add", "shuffle_xor", "shuffle_index", "reduce_add",
    "unpack16", "unpack32", "grid_wait", "grid_signal",
)  # fmt: skip
CODES = {name: code for code, name in enumerate([*(name for name, *_ in _TABLE), *_OTHERS])}
_SPELLED = {spelling: name for name, spellings, _ in _TABLE for spelling in spellings.split()}
_SOURCES = {
    name: max("ABC".index(x) for x in re.findall(r"\b[ABC]\b", result)) + 1 for name, _, result in _TABLE
}
_SIGNED = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5}
_UNORDERED = {f"{name}u": number + 16 for name, number in _SIGNED.items()}  # true of NaN too
_COMPARISONS = {
    "b": _SIGNED,
    "s": _SIGNED,
    "u": {**_SIGNED, "lo": 2, "ls": 3, "hi": 4, "hs": 5},
    "f": {**_SIGNED, **_UNORDERED, "nan": 6, "num": 7},
}
# the first registers
_SPECIAL = ("%tid.x", *(f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"))
_REGISTER = re.compile(r"%(p|r|rd|rs|f|fd|h)\d+")
_NUMBER = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})|(-?(?:0x[0-9a-fA-F]+|\d+))U?")
_IGNORED = re.compile(r"(\.reg|\.file|\.pragma|\$L__tmp)[^;]*;?")
_DROPPED = ("_", "tmp")
# Caches and how long they keep something change nothing that is computed.
_ACCESS = re.compile(
    r"(?:ld|st)\.(global|shared(?:::cta)?)(?:\.(?:L[12]::\w+|ca|cg|cs|nc))*(?:\.v([248]))?\.([bfus])(8|16|32|64)"
)
_PARAMETER = re.compile(r"ld\.param\.([bfus])(32|64)")
_MATRIX = re.compile(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_ATOMIC = re.compile(r"atom\.global(?:\.(cta|gpu|sys))?(?:\.(acq_rel|acquire|release|relaxed))?\.add\.[su]32")
_WIDTHS = {"rs": 16, "h": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}  # of registers, by their names
_WHOLE_WARP = ("-1", "0xffffffff")
# with all that they may have for operands
_PLAIN = {("ret",): "exit", ("bar.sync", "0"): "barrier", ("barrier.sync", "0"): "barrier"}
_PLAIN |= {("bar.warp.sync", mask): "warp_sync" for mask in _WHOLE_WARP}
_PLAIN |= {("griddepcontrol.wait",): "grid_wait", ("griddepcontrol.launch_dependents",): "grid_signal"}


class UnknownInstruction(NotImplementedError):
    """The executor does not have this instruction of PTX."""


class Program:
    """The instructions of a kernel.

    Args:
        text: The PTX of a module with one kernel.

    Raises:
        UnknownInstruction: The kernel has a statement that the executor does not know in all its parts."""

    def __init__(self, text: str) -> None:
        self.registers = {name: number for number, name in enumerate(_SPECIAL)}
        self._constants: dict[int, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._labels: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._place = 0  # in the source; 0 where the module does not say
        self.parameters: dict[int, str] = {}  # those that it loads: where, for messages
        threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1\b)*\s*$", text, re.MULTILINE)
        if threads is None or int(threads[1]) % LANES:
            raise UnknownInstruction("a kernel of Triton's has .reqntid, its threads, which are whole warps")
        self.warps = int(threads[1]) // LANES
        place = ""
        for line, statement in self._statements(text):
            place = f"line {line}: {statement}"
            self._add(statement, line, place)
        last = self._rows[-1] if self._rows else {}
        if "guard" in last or last.get("op") not in _ENDS:
            raise UnknownInstruction(f"{place}: a kernel ends with ret, or a branch")
        self.code: np.ndarray = np.zeros(len(self._rows), INSTRUCTION)
        self.code["to"] = self.code["from"] = self.code["guard"] = -1
        for row, instruction in zip(self._rows, self.code, strict=True):
            if "target" in row:
                label, place = row["target"]
                row["target"] = self._labels.get(label, len(self._rows))
                if row["target"] == len(self._rows):
                    raise UnknownInstruction(f"{place}: no instruction has this label")
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
            if not line or line in "{}" or _IGNORED.fullmatch(line):
                continue
            first = first if pending else number
            pending = f"{pending} {line}".strip()
            if pending.endswith(";"):
                yield first, pending[:-1].strip()
                pending = ""

    def _source(self, operand: str) -> int:
        """The number of a register, or of a constant."""
        free = len(self.registers) + len(self._constants)
        if _REGISTER.fullmatch(operand) or operand in _SPECIAL:
            return self.registers.setdefault(operand, free)
        if operand == "global_smem":  # shared memory begins at 0
            return self._constants.setdefault(0, free)
        number = _NUMBER.fullmatch(operand)
        if number is None:
            raise ValueError
        single, double, integer = number.groups()
        value = int(integer, 0) if integer else int(single or double, 16)
        return self._constants.setdefault(value % 2**64, free)

    def _target(self, operand: str) -> int:
        """The number of a register that is written."""
        if not _REGISTER.fullmatch(operand):
            raise ValueError
        return self._source(operand)

    def _targets(self, operand: str) -> list[int]:
        """-1 where the value is dropped."""
        return [-1 if name in _DROPPED else self._target(name) for name in _several(operand)]

    def _sources(self, operands: list[str], count: int) -> list[int]:
        if len(operands) != count:
            raise ValueError
        return [self._source(operand) for operand in operands]

    def _address(self, operand: str) -> dict[str, Any]:
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise ValueError
        return {"from": [self._source(found[1])], "offset": int(found[2] or 0)}

    def _add(self, statement: str, line: int, place: str) -> None:
        row: dict[str, Any] = {"line": line, "place": self._place}
        try:
            if guarded := re.match(r"@(!?)(%p\d+)\s+(.*)", statement, re.DOTALL):
                row["guard"] = 2 * self._source(guarded[2]) + (guarded[1] == "!")
                statement = guarded[3]
            opcode, *rest = statement.split(None, 1)
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest[0] if rest else "")
            name, fields = self._decode(opcode, operands)
            row |= {"op": CODES[name], **fields}
            if len(fields.get("to", ())) > 8 or name == "parameter" and "guard" in row:
                raise ValueError
        except (KeyError, IndexError, ValueError):
            raise UnknownInstruction(place) from None
        if name == "branch":
            row["target"] = fields["target"], place
        if name == "parameter":
            self.parameters[fields["offset"]] = place
        self._rows.append(row)

    def _decode(self, opcode: str, operands: list[str]) -> tuple[str, dict[str, Any]]:
        """The instruction's name, and its fields."""
        kind = opcode.partition(".")[0]
        if kind in ("ld", "st", "ldmatrix", "stmatrix"):
            return self._access(opcode, operands)
        if atomic := _ATOMIC.fullmatch(opcode):
            to, where, value = operands
            address = self._address(where)
            address["from"].append(self._source(value))
            flag = atomic.groups() == ("gpu", "acq_rel")
            return "atomic_add", {"to": [-1 if to == "_" else self._target(to)], "flag": flag, **address}
        if kind == "bra":
            (label,) = operands
            return {"bra": "branch", "bra.uni": "branch"}[opcode], {"target": label}
        if plain := _PLAIN.get((opcode, *operands)):
            return plain, {}
        if kind == "mov" and "{" in "".join(operands):
            width = {"mov.b32": "16", "mov.b64": "32"}[opcode]
            to, source = operands
            if to.startswith("{"):
                targets = self._targets(to)
                if len(targets) != 2:
                    raise ValueError
                return f"unpack{width}", {"to": targets, "from": [self._source(source)]}
            return f"pack{width}", {"to": [self._target(to)], "from": self._sources(_several(source), 2)}
        to, *sources = operands
        target = {"to": [self._target(to)]}
        if opcode == "cvt.s8.s32" and _width(to) != 16:
            raise ValueError  # a wider register would get the sign in all of it
        if opcode in _SPELLED:
            name = _SPELLED[opcode]
            return name, {**target, "from": self._sources(sources, _SOURCES[name])}
        if kind == "setp":
            _, comparison, of = opcode.split(".")
            compare = _COMPARISONS[of[0]][comparison]
            name = f"set_{of.replace('b', 'u')}"
            return name, {**target, "from": self._sources(sources, 2), "compare": compare}
        if kind == "shfl":
            *sources, bounds, lanes = sources
            if bounds != "31" or lanes not in _WHOLE_WARP:
                raise ValueError
            name = {"shfl.sync.bfly.b32": "shuffle_xor", "shfl.sync.idx.b32": "shuffle_index"}[opcode]
            return name, {**target, "from": self._sources(sources, 2)}
        if opcode in ("redux.sync.add.s32", "redux.sync.add.u32"):
            return "reduce_add", {**target, "from": self._sources(sources, 2)}
        if re.fullmatch(r"createpolicy\.fractional\.L2::\w+\.b64", opcode) and len(sources) == 1:
            # a hint, which the executor's loads and stores do not look at
            return "move", {**target, "from": [self._source("0")]}
        raise ValueError

    def _access(self, opcode: str, operands: list[str]) -> tuple[str, dict[str, Any]]:
        name = "load" if opcode.startswith("ld") else "store"
        count = 2 + ("cache_hint" in opcode)
        if len(operands) != count:
            raise ValueError
        values, address = operands[:2] if name == "load" else operands[1::-1]
        if parameter := _PARAMETER.fullmatch(opcode):
            number = re.fullmatch(r"\[\w+_param_(\d+)\]", address)
            if number is None:
                raise ValueError
            # All 64 bits of a parameter are there, an integer's with its sign.
            wide = parameter[1] == "s" and _width(values) == 64
            size = 8 if wide else int(parameter[2]) // 8
            return "parameter", {"to": [self._target(values)], "offset": int(number[1]), "size": size}
        fields = self._address(address)
        names = _several(values)
        fields["to"] = self._targets(values) if name == "load" else self._sources(names, len(names))
        fields["count"] = len(names)
        if matrix := _MATRIX.fullmatch(opcode):
            if int(matrix[1]) != len(names) or -1 in fields["to"]:
                raise ValueError
            return f"{name}_matrix", {**fields, "size": 2, "flag": bool(matrix[2])}
        access = _ACCESS.fullmatch(opcode)
        if access is None or int(access[2] or 1) != len(names):
            raise ValueError
        space, _, kind, bits = access.groups()
        # A wider register would get the sign, which the executor's loads leave out.
        if (
            kind == "s"
            and name == "load"
            and any(_width(register) not in (None, int(bits)) for register in names)
        ):
            raise ValueError
        return name + ("" if space == "global" else "_shared"), {**fields, "size": int(bits) // 8}


def _several(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _width(operand: str) -> int | None:
    """The bits of a register; None of what is dropped."""
    return None if operand in _DROPPED else _WIDTHS[operand.strip("%0123456789")]


_ENDS = (CODES["exit"], CODES["branch"])
_SHARED = (CODES["load_shared"], CODES["store_shared"])
_MATRICES = (CODES["load_matrix"], CODES["store_matrix"])
