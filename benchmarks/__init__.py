"""What bnfast does on the machine at hand: `python3 -m benchmarks`.

Before `environment.ensure()` has run, only `environment` and `report` may be imported: the rest needs torch.
"""
