"""What bnfast does on the machine at hand: `python3 -m benchmarks`.

The command imports this module and `suites` before `environment.ensure()` has run: they need no package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmark-results")  # where the folder of a run goes
LAYERS = ("BatchNorm", "GroupNorm", "InstanceNorm")  # to train the digits with


class Refused(ValueError):
    """What was asked for cannot be done: the command says why and ends with 2, as for a wrong option."""
