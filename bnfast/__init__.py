"""bnfast: fused normalization layers for PyTorch, in Triton.

    bnfast.BatchNorm2d          drop-in for torch.nn.BatchNorm2d (and 1d, 3d)
    bnfast.BatchRenorm2d        Batch Renormalization (and 1d, 3d)
    bnfast.LayerNorm            drop-in for torch.nn.LayerNorm
    bnfast.GroupNorm            drop-in for torch.nn.GroupNorm
    bnfast.InstanceNorm2d       drop-in for torch.nn.InstanceNorm2d (and 1d, 3d)
    bnfast.fuse                 a model's activations and residual adds inside its layers' calls
    bnfast.functional           the same as functions, with torch.nn.functional's signatures

CUDA tensors run the Triton kernels. Everything else runs plain torch, with the same results: `python -m
bnfast info` says which and why."""

from . import functional, modules
from .convert import convert, revert
from .fuse import fuse, fusion_report, unfuse
from .kernels.epilogue import Activation
from .modules import *  # noqa: F403
from .registries import fill

fill()

__version__ = "0.1.0"

__all__ = [
    *modules.__all__,
    "Activation",
    "convert",
    "functional",
    "fuse",
    "fusion_report",
    "revert",
    "unfuse",
    "__version__",
]
