"""`python3 -m codegen.same_code`: whether a change of the sources changed any kernel's machine code.

    python3 -m codegen.same_code save before      at the old commit: the machine code of every budget's kernel
    python3 -m codegen.same_code compare before   at the new one: names each kernel whose code differs

Run both with each Triton in question. Two codes are the same if their instructions are, in the same
order, with the same registers and immediate values. Names, labels, and the offsets at which a kernel finds
its parameters do not count: they change with the list of arguments.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path

import triton
from tqdm import tqdm

from codegen import launches
from codegen.cases import CASES
from codegen.sass_flow import TARGET, Instruction

PARAMETER = re.compile(r"c\[0x0\]\[(?:0x[0-9a-f]+|(U?R\d+)(?:\+0x[0-9a-f]+)?)\]")
FIRST_DIFFERENCES = 12  # lines shown of a kernel that differs


def essential(instruction: Instruction) -> str:
    """An instruction without what may change though the code is the same."""
    return TARGET.sub("LABEL", PARAMETER.sub("PARAMETER", str(instruction)))


def kernels() -> dict[str, list[str]]:
    """The instructions of every budget's kernels, by launch, for the Triton that runs."""
    return {
        f"{case}, {direction} {number}": [essential(each) for each in launched.report.code.instructions]
        for case in tqdm(CASES, f"compiling with Triton {triton.__version__}", unit="case")
        for direction, several in launches.of_case(case).items()
        for number, launched in enumerate(several, 1)
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m codegen.same_code", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["save", "compare"])
    parser.add_argument("folder", type=Path, help="has one file for each Triton")
    options = parser.parse_args(arguments)
    path = options.folder / f"triton-{triton.__version__}.json"
    now = kernels()
    if options.action == "save":
        options.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now), encoding="utf-8")
        print(f"{len(now)} kernels saved in {path}")
        return 0
    before, differ = json.loads(path.read_text(encoding="utf-8")), 0
    for key in sorted(before.keys() | now.keys()):
        was, is_ = before.get(key, []), now.get(key, [])
        if was != is_:
            differ += 1
            lines = list(difflib.unified_diff(was, is_, n=0, lineterm=""))[2 : 2 + FIRST_DIFFERENCES]
            print(f"{key}: {len(was)} instructions before, {len(is_)} after", *lines, sep="\n    ")
    print(f"Triton {triton.__version__}: {len(now)} kernels, {differ} differ")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
