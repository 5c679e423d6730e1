"""The operators that stand for kernels in graphs, one file for each normalization."""
