"""fuse, unfuse and fusion_report: activations and residual adds of a model inside the calls of its layers."""

from __future__ import annotations

import logging
import threading

from torch import nn

from .convert import convert
from .fusing import blocks
from .fusing.report import Fused, FusionReport, Skipped, report
from .fusing.survey import fuse_block

__all__ = ["Fused", "FusionReport", "Skipped", "fuse", "fusion_report", "unfuse"]

_LOG = logging.getLogger("bnfast")
_ONE_THREAD = threading.RLock()  # torch.fx replaces torch.nn.Module's __call__ while it traces


def fuse(model: nn.Module) -> nn.Module:
    """Converts a model in place, and moves activations and residual adds into its layers' calls.

    norm -> activation and norm -> add -> activation become one call, where nothing else uses the values
    between them. The activation may be a module, a function or a tensor method, in place or not, with
    nn.Identity between. The activations are those of `bnfast.Activation`. Layers, parameters and their names
    stay; the module whose forward calls them gets a subclass of its class, under the same name. It runs the
    original forward wherever that may have come to differ: other plain attributes, other children, hooks,
    other arguments, other values of the globals, closure variables, defaults and class attributes that it
    reads. A forward that reads `self.training` is fused in both modes.

    A forward is replaced by what torch.fx records of it. What it prints is not recorded. A forward that asks
    whether torch.fx or torch.compile is at work is answered once and for all, and so are questions about
    torch's own settings, except for grad mode and autocast. Forwards are left as they are if they cannot be
    traced, ask for the type of something, write to what does not belong to them, or read what may change
    unseen (the environment, the clock, files, random numbers); `fusion_report` lists them.

    Several threads may fuse, or ask for reports, at once. But no other thread may call a model of any kind
    meanwhile, for torch.fx replaces the call of all modules while it traces.

    The logger "bnfast" reports at level INFO what `convert` reports, and which blocks were left as they are
    and why.

    Args:
        model (nn.Module): The model. It is changed in place.

    Returns:
        The model; a new one only if it is itself a layer that was converted.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = bnfast.fuse(model)
        >>> print(bnfast.fusion_report(model))
        1 fused, 0 not
        1: relu fused in, in the forward of the model
    """
    _check("fuse", model)
    with _ONE_THREAD:
        model = blocks.unfuse(convert(model))
        claimed: set[nn.Module] = set()
        for name, module in list(model.named_modules()):
            reason = fuse_block(module, claimed)
            if reason is not None:
                _LOG.info("fuse: %s is left as it is: %s", name or "the model", reason)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every block its original class back, in place. The layers stay bnfast's.

    It warns of blocks whose class somebody has replaced since they were fused, and leaves them.

    Args:
        model (nn.Module): The model.

    Returns:
        The model.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> model = bnfast.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> type(bnfast.unfuse(model)) is nn.Sequential
        True
    """
    _check("unfuse", model)
    return blocks.unfuse(model)


def fusion_report(model: nn.Module) -> FusionReport:
    """Says which layers a call of the model would fuse as it stands now, and why not the others.

    Args:
        model (nn.Module): The model, fused or not.

    Returns:
        A FusionReport: `fused` and `skipped`, which together have every normalization layer of the model
        once. Its str() groups the skipped layers by reason.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> bnfast.fusion_report(model).skipped[0].reason
        'bnfast.fuse (or bnfast.convert) has not been called'
        >>> bnfast.fusion_report(bnfast.fuse(model)).fused[0].activation
        Activation(name='relu', parameter=0.0)
    """
    _check("fusion_report", model)
    with _ONE_THREAD:
        return report(model)


def _check(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"bnfast.{name} takes a torch.nn.Module, but got {type(model).__name__}")
