"""What `activation=` takes. kernels/epilogue.py has the table of activations."""

from .kernels.epilogue import NAMES as NAMES
from .kernels.epilogue import PARAMETERS as PARAMETERS
from .kernels.epilogue import Activation as Activation
from .kernels.epilogue import ActivationLike as ActivationLike
