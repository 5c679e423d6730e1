"""The kernels looked at without a GPU: what a layer launches, and what its machine code says. Its modules
need Triton."""

SMS = 132  # multiprocessors of an H200, for which grids are planned and bytes in flight counted
