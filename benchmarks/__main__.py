"""`python3 -m benchmarks`: what bnfast does on this machine, in one command that sets itself up."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import environment, report

DEFAULT = "first-look"


def first_look(options: argparse.Namespace, lacking: list[str]) -> int:
    from benchmarks import first_look as job  # needs torch, which may only have come with `ensure`

    return job.run(options, lacking)


def parser() -> argparse.ArgumentParser:
    """A job is a subcommand with options of its own, and the function to hand them to."""
    about = "What bnfast does on this machine."
    whole = argparse.ArgumentParser(prog="python3 -m benchmarks", description=about)
    jobs = whole.add_subparsers(title="jobs", metavar="JOB")
    about = "the default: train a network with torch.nn and with bnfast, and go through ResNet-50's layers"
    job = jobs.add_parser(DEFAULT, help=about, description=about)
    job.set_defaults(run=first_look)
    job.add_argument("--epochs", type=int, default=6, help="of each training run (default: %(default)s)")
    job.add_argument("--seed", type=int, default=0, help="of network and batches (default: %(default)s)")
    job.add_argument("--device", help='"cpu", "cuda", "cuda:1" (default: a GPU if there is one)')
    where = f"where the folder of results goes (default: {report.RESULTS})"
    job.add_argument("--out", type=Path, help=where)
    return whole


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
