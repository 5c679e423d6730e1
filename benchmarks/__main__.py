"""`python3 -m benchmarks`: what bnfast does on this machine, in one command that sets itself up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import LAYERS, environment, report
from benchmarks.suites import LAYOUTS, SUITES

Adds = Callable[..., Any]  # a parser's add_argument

DEFAULT = "first-look"


# A job's module is imported last: it needs torch, which may only have come with `ensure`.


def first_look(options: argparse.Namespace, lacking: list[str]) -> int:
    from benchmarks import first_look as job

    return job.run(options, lacking)


def digits(options: argparse.Namespace, lacking: list[str]) -> int:
    from benchmarks import training as job

    return job.run(options, lacking)


def suites(options: argparse.Namespace, lacking: list[str]) -> int:
    from benchmarks import suite_run as job

    return job.run(options, lacking)


def memory(options: argparse.Namespace, lacking: list[str]) -> int:
    from benchmarks import memory as job

    return job.run(options, lacking)


def parser() -> argparse.ArgumentParser:
    """A job is a subcommand with options of its own, and the function to hand them to."""
    about = "What bnfast does on this machine."
    whole = argparse.ArgumentParser(prog="python3 -m benchmarks", description=about)
    jobs = whole.add_subparsers(title="jobs", metavar="JOB")

    def add(name: str, run: Callable[[argparse.Namespace, list[str]], int], about: str) -> Adds:
        job = jobs.add_parser(name, help=about, description=about)
        job.set_defaults(run=run)
        return job.add_argument

    option = add(
        DEFAULT,
        first_look,
        "the default: train a network with torch.nn and with bnfast, and go through the layers of others",
    )
    trains(option)
    everywhere(option)

    option = add("run", suites, "go through every normalization layer of some networks")
    names = f"which networks: {', '.join(SUITES)} or all"
    option("--suite", choices=[*SUITES, "all"], required=True, metavar="SUITE", help=names)
    kinds = f"of the tensors: {', '.join(LAYOUTS)} or both (default: what each network usually runs in)"
    option("--layout", choices=[*LAYOUTS, "both"], metavar="LAYOUT", help=kinds)
    everywhere(option)

    option = add("memory", memory, "count what ResNet-50 keeps for its backward")
    everywhere(option)

    option = add("digits", digits, "train a network with a layer of torch.nn and with bnfast's")
    layers = f"{', '.join(LAYERS)} (default: %(default)s)"
    option("--layer", choices=LAYERS, default=LAYERS[0], metavar="LAYER", help=layers)
    trains(option)
    everywhere(option)
    return whole


def trains(option: Adds) -> None:
    """The options of jobs that train."""
    option("--epochs", type=int, default=6, help="of each training run (default: %(default)s)")
    option("--seed", type=int, default=0, help="of network and batches (default: %(default)s)")


def everywhere(option: Adds) -> None:
    """The options of all jobs."""
    option("--device", help='"cpu", "cuda", "cuda:1" (default: a GPU if there is one)')
    option("--out", type=Path, help=f"where the folder of results goes (default: {report.RESULTS})")


def main(arguments: list[str]) -> int:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [DEFAULT, *arguments]
    options = parser().parse_args(arguments)
    lacking = environment.ensure()
    if lacking:
        environment.say(f"going on without {', '.join(lacking)}; what needs them is named below.")
    return int(options.run(options, lacking))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped")
