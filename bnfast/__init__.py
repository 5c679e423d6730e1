"""Fused normalization layers for PyTorch, in Triton.

Layers, each with torch.nn's arguments and `activation=`; a call takes a residual as its second argument:

    BatchNorm1d, BatchNorm2d, BatchNorm3d             as torch.nn's
    BatchRenorm1d, BatchRenorm2d, BatchRenorm3d       Batch Renormalization; torch.nn has none
    FrozenBatchNorm2d     BatchNorm2d with constant statistics and affine, as in torchvision and detectron2
    GroupNorm             as torch.nn's
    InstanceNorm1d, InstanceNorm2d, InstanceNorm3d    as torch.nn's
    LayerNorm             as torch.nn's

Functions, with the arguments of torch.nn.functional's and `activation=` and `residual=`:

    functional.batch_norm, functional.group_norm, functional.instance_norm, functional.layer_norm
    functional.batch_renorm     Batch Renormalization, with the limits of r and d as arguments

Whole models:

    convert             makes bnfast's layers of a model's normalization layers, in place
    fuse                converts, and runs activations and residual adds inside the layers' kernels
    fusion_report       says what is fused, and why the rest is not
    unfuse              undoes what fuse adds to convert
    revert              makes torch.nn's layers again

And:

    Activation          an activation with its parameter: what a layer's `activation` is
    __version__         the version of bnfast

CUDA tensors run the Triton kernels. Everything else runs plain torch, with the same results: `python -m
bnfast info` says which and why."""

from . import functional, modules
from .activation import Activation
from .convert import convert, revert
from .fuse import fuse, fusion_report, unfuse
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
