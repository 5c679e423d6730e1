"""The parts of a check of the kernels, on any device: cases, one step of a layer, its expected results in
fp64, and torch's own layers for comparison."""
