"""torch.nn.functional's normalizations over the kernels."""

from .ops.batch_norm import batch_norm
from .ops.batch_renorm import batch_renorm
from .ops.group_norm import group_norm
from .ops.instance_norm import instance_norm
from .ops.layer_norm import layer_norm

__all__ = ["batch_norm", "batch_renorm", "group_norm", "instance_norm", "layer_norm"]
