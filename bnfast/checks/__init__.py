"""What a check of the kernels is made of, on any device: cases, one step of a layer, what is true of it in
fp64, and torch's own layers beside it."""
