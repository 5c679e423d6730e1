"""BatchNorms as other code finds them that builds a layer of its own from what one holds."""

from __future__ import annotations

import sys
import warnings
from types import CodeType, FrameType

import torch

from .drop_in import DropIn

# Functions that build another layer in the place of whatever is one of torch.nn's BatchNorms: torch's and
# timm's, apex's; detectron2's; timm's and open_clip's; timm's. torch.utils.mkldnn does so in a constructor.
TO_SYNC = ("convert_sync_batchnorm", "convert_syncbn_model")
_TO_ANOTHER = (*TO_SYNC, "convert_frozen_batchnorm", "freeze_batch_norm_2d", "convert_splitbn_model")
_MKLDNN = "torch.utils.mkldnn"
_IN_GRAPHS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
_TAKEN = {"num_features", "running_mean", "running_var"}  # what each of them reads besides


class Replaceable(DropIn):
    """Mixed into a BatchNorm. It raises where a bare layer is built in its place that would do less."""

    __jit_unused_properties__ = ("affine",)  # torch.jit.script would compile it

    @property
    def affine(self) -> bool:
        """torch.nn's attribute. No forward reads it, but all of those functions do: they build a bare layer
        from a BatchNorm's attributes, and none of them asks the BatchNorm in any other way."""
        if torch.compiler.is_compiling():  # Dynamo knows no frames
            if not _IN_GRAPHS:  # 2.11's takes a look into __dict__ for a call of this property
                return self.weight is not None
        else:
            caller = sys._getframe(1)
            if _builds_another(caller.f_code) or caller.f_globals.get("__name__") == _MKLDNN:
                self._replaced_by(caller)
        try:
            return bool(self.__dict__["affine"])
        except KeyError:
            raise AttributeError("affine") from None

    @affine.setter
    def affine(self, value: bool) -> None:
        self.__dict__["affine"] = value

    def _replaced_by(self, caller: FrameType) -> None:
        by = caller.f_code.co_name if caller.f_code.co_name in _TO_ANOTHER else _MKLDNN
        lost = self._lost_in(by, caller)
        if lost is not None:
            raise RuntimeError(f"{type(self).__name__} {lost}")
        if by in TO_SYNC:
            warnings.warn(
                f"{by} puts a SyncBatchNorm in the place of bnfast's BatchNorms: it computes the same, but "
                "not on bnfast's kernels, and what bnfast.fuse had put inside their calls runs by itself "
                "again. bnfast.revert(model) first says that this is meant",
                stacklevel=3 + _calls_of_itself(caller),
            )

    def _lost_in(self, by: str, caller: FrameType) -> str | None:
        """What the bare layer that a function builds would not do as this one does, and a way out."""
        if self.activation is None:
            return None
        return (
            f"applies {self.activation.name} itself, which the layer that {by} builds in its place does not: "
            "make it without activation= and apply that in a module behind it, which bnfast.fuse takes in"
        )


def _builds_another(code: CodeType) -> bool:
    """Whether a function is one of those, and not somebody's of the same name. The first is often copied, and
    goes by its name alone."""
    name = code.co_name
    return name == TO_SYNC[0] or (name in _TO_ANOTHER and _TAKEN.issubset(code.co_names))


def _calls_of_itself(frame: FrameType) -> int:
    """How many calls of a function stand above its caller's."""
    calls, above = 1, frame.f_back
    while above is not None and above.f_code is frame.f_code:
        calls, above = calls + 1, above.f_back
    return calls
