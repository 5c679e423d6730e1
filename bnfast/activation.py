"""What `activation=` takes. kernels/epilogue.py has the table of activations."""

from .kernels.epilogue import NAMES as NAMES
from .kernels.epilogue import PARAMETERS as PARAMETERS
from .kernels.epilogue import Activation as Activation
from .kernels.epilogue import ActivationLike as ActivationLike

Activation.__doc__ = """An activation that the kernels apply: what a layer holds as `activation`.

The names are relu, relu6, leaky_relu, elu, silu, gelu, gelu_tanh, hardswish, hardsigmoid, mish, sigmoid and
tanh. `Activation.of(value)` makes one of all that an `activation=` argument takes, and raises ValueError for
anything else.

Args:
    name (str): One of bnfast.activation.NAMES.
    parameter (float): The slope of leaky_relu below 0, or the alpha of elu; 0 for all others.

Example:
    >>> bnfast.Activation.of("LeakyReLU")
    Activation(name='leaky_relu', parameter=0.01)
    >>> bnfast.Activation.of(("elu", 0.5))
    Activation(name='elu', parameter=0.5)
    >>> bnfast.Activation.of(nn.SiLU()) == bnfast.Activation.of(F.silu) == bnfast.Activation("silu")
    True
    >>> bnfast.GroupNorm(4, 16, activation=nn.GELU).activation
    Activation(name='gelu', parameter=0.0)
"""
