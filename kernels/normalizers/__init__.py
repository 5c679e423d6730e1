"""What a normalizer is to the kernels, a file each."""
