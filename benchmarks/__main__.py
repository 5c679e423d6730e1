"""`python3 -m benchmarks`: what bnfast does on this machine, in one command that sets itself up."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import LAYERS, RESULTS, Refused, environment
from benchmarks.suites import LAYOUTS, SUITES

DEFAULT = "first-look"
# Named here and not asked of their modules, which need torch.
DTYPES = ("bf16", "fp16", "fp32")
PARTS = (
    "correctness",
    "machine",
    "resnet50",
    "groupnorm",
    "step",
    "overlap",
    "compiled",
    "cudnn-frontend",
    "tiles",
)
PEERS = ("resnet50", "groupnorm", "layernorm", "small")
BASELINES = ("torch", "native", "cudnn-op", "cudnn-frontend", "compile", "compile-max")


def parser() -> argparse.ArgumentParser:
    """A job is a subcommand with options of its own, and the module whose `run` they are handed to; or
    another function of it, after a colon."""
    about = "What bnfast does on this machine."
    whole = argparse.ArgumentParser(prog="python3 -m benchmarks", description=about)
    jobs = whole.add_subparsers(title="jobs", metavar="JOB")

    def add(name: str, module: str, about: str, results: bool = True) -> Callable[..., Any]:
        job = jobs.add_parser(name, help=about, description=about)
        job.set_defaults(module=module)
        if results:
            job.add_argument("--device", help='"cpu", "cuda", "cuda:1" (default: a GPU if there is one)')
            where = f"where the folder of results goes (default: {RESULTS})"
            job.add_argument("--out", type=Path, help=where)
        return job.add_argument

    about = "the default: train a network with torch.nn and with bnfast, and go through the layers of others"
    option = add(DEFAULT, "first_look", about)
    layers = f"of the network that is trained: {', '.join(LAYERS)} (default: %(default)s)"
    option("--layer", choices=LAYERS, default=LAYERS[0], metavar="LAYER", help=layers)
    option("--epochs", type=positive, default=6, help="of each training run (default: %(default)s)")

    option = add("run", "layers", "predict every normalization layer of some networks; on a GPU, time it")
    names = f"which networks: {', '.join(SUITES)} or all (default: %(default)s)"
    option("--suite", choices=[*SUITES, "all"], default="resnet50", metavar="SUITE", help=names)
    kinds = f"of the tensors: {', '.join(LAYOUTS)} or both (default: what each network usually runs in)"
    option("--layout", choices=[*LAYOUTS, "both"], metavar="LAYOUT", help=kinds)
    kinds = f"{', '.join(DTYPES)} (default: bf16, on a GPU fp16 too where cuDNN takes it)"
    option("--dtype", choices=DTYPES, nargs="+", metavar="DTYPE", help=kinds)
    option("--direction", choices=["fwd", "bwd", "both"], default="both", help="(default: %(default)s)")
    others = f"what to time beside bnfast: {', '.join(BASELINES)} (default: %(default)s)"
    option(
        "--baseline", choices=BASELINES, nargs="+", default=list(BASELINES[:4]), metavar="NAME", help=others
    )
    option("--quick", action="store_true", help="fewer readings, L2 cold only, no CUDA graphs")

    about = "count and model bnfast beside what torch.compile generates, executed without a GPU"
    option = add("peers", "peers", about)
    what = f"which layers: {', '.join(PEERS)} (default: %(default)s)"
    option("--suite", choices=PEERS, default="small", metavar="SUITE", help=what)
    option("--batch", type=positive, metavar="N", help="of layernorm, the rows (default: each suite's own)")
    kinds = f"of the tensors: {', '.join(LAYOUTS)} or both (default: what each network usually runs in)"
    option("--layout", choices=[*LAYOUTS, "both"], metavar="LAYOUT", help=kinds)

    option = add("gpu", "battery", "run what needs a GPU, what matters most first, in at most nine minutes")
    option("--limit", type=positive, default=540, metavar="SECONDS", help="(default: %(default)s)")
    only = f"only these, of {', '.join(PARTS)} (default: all)"
    option("--part", choices=PARTS, nargs="+", metavar="PART", help=only)

    about = "make tables and pictures of the CSV files of an earlier run; of two runs, compare the figures"
    option = add("report", "report", about, results=False)
    paths = "a file, or a folder of them; two: before, after"
    option("paths", nargs="+", type=Path, metavar="PATH", help=paths)
    option("--out", type=Path, help="where pictures go (default: beside the path)")
    option("--top", type=positive, default=30, help="lines of a comparison (default: %(default)s)")

    about = "make the section on performance of docs/benchmarks.md from benchmarks/results"
    add("readme", "report:write_readme", about, results=False)
    add("host", "host", "time what an eager call costs the host, with a GPU's driver made up")
    return whole


def positive(text: str) -> int:
    """argparse's answer for all else names the option and what came."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def main(arguments: list[str]) -> int:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [DEFAULT, *arguments]
    options = parser().parse_args(arguments)
    lacking = environment.ensure()
    if lacking:
        environment.say(f"going on without {', '.join(lacking)}; what needs them is named below.")
    module, _, function = options.module.partition(":")
    # only now: it needs torch, which may just have come
    job = getattr(importlib.import_module(f"benchmarks.{module}"), function or "run")
    try:
        return int(job(options, lacking))
    except Refused as e:
        print(f"python3 -m benchmarks: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped")
