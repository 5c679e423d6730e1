"""torch.nn.functional's normalizations over the kernels, one file each."""

from .batchnorm import batch_norm as batch_norm
from .batchrenorm import batch_renorm as batch_renorm
from .groupnorm import group_norm as group_norm
from .instancenorm import instance_norm as instance_norm
from .layernorm import layer_norm as layer_norm
