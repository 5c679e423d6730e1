"""Autograd around the kernels, one file for each normalization."""
