"""What bnfast does on the machine at hand: `python3 -m benchmarks`.

Before `environment.ensure()` has run, only `environment`, `report` and `suites` may be imported: the rest
needs torch.
"""

LAYERS = ("BatchNorm", "BatchRenorm", "GroupNorm", "InstanceNorm", "LayerNorm")  # to train the digits with
