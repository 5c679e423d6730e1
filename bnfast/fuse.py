"""Whole models: activations and residual adds folded into the normalization layers' calls."""

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
_ONE_THREAD = threading.RLock()  # torch.fx exchanges torch.nn.Module's __call__ while it traces


def fuse(model: nn.Module) -> nn.Module:
    """Converts a model, in place, and lets its layers apply the activations and residual adds after them.

    norm -> activation and norm -> add -> activation become one call, where nothing else uses what lies
    between: modules, functions and tensor methods, in place or not, with Identity in between. The activations
    are those of `bnfast.Activation`. Layers, parameters and their names stay; the module whose forward calls
    them gets a subclass of its class, under the same name. It takes the original forward wherever that may
    have come to differ: other plain attributes, other children, hooks, other arguments, other values of the
    globals, closure variables, defaults and class attributes that it reads. It knows both ways of a forward
    that reads `self.training`.

    A forward is replaced by what torch.fx records of it. What it prints is not recorded, and one that asks
    whether torch.fx or torch.compile is at work is answered for good, as are questions about torch's own
    settings, except for grad mode and autocast. Forwards that cannot be traced, that ask for the type of
    something, that write to what is not theirs, or that read what may change unseen (the environment, the
    clock, files, random numbers) are left, and `fusion_report` lists them.

    Threads may fuse, or ask for reports, at once; but no other thread may call a model meanwhile, of whatever
    kind, for torch.fx replaces the call of all modules while it traces.

    Returns the model (a new one only if it is itself a layer that was converted). Logs what `convert` logs,
    and which blocks were left as they are and why, to the logger "bnfast" at level INFO. Raises TypeError for
    anything but a torch.nn.Module.
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
    """Gives every block its original class back, in place, and returns the model. Warns of blocks whose class
    somebody has replaced since they were fused: these stay. Raises TypeError for anything but a
    torch.nn.Module."""
    _check("unfuse", model)
    return blocks.unfuse(model)


def fusion_report(model: nn.Module) -> FusionReport:
    """What a call of the model would fuse as it stands now, and why its other layers run by themselves.
    Raises TypeError for anything but a torch.nn.Module."""
    _check("fusion_report", model)
    with _ONE_THREAD:
        return report(model)


def _check(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"bnfast.{name} takes a torch.nn.Module, but got {type(model).__name__}")
