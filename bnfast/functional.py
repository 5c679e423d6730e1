"""torch.nn.functional's normalizations over the kernels."""

from .ops.batch_norm import batch_norm as batch_norm
from .ops.batch_renorm import batch_renorm as batch_renorm
from .ops.group_norm import group_norm as group_norm
from .ops.instance_norm import instance_norm as instance_norm
from .ops.layer_norm import layer_norm as layer_norm
