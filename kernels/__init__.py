"""Triton kernels for normalization, and the host code that plans and launches them. Knows nothing of
torch.nn.
"""
