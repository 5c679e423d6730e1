"""What a BatchNorm does when code of another library builds a layer of its own from its attributes."""

from __future__ import annotations

import sys
import warnings
from types import CodeType, FrameType

import torch

from .mixins import NormMixin

# Functions that replace every instance of torch.nn's BatchNorms by a layer that they build. They belong to
# torch and timm, apex; detectron2; timm and open_clip; timm. torch.utils.mkldnn does so in a constructor.
TO_SYNC = ("convert_sync_batchnorm", "convert_syncbn_model")
_TO_ANOTHER = (*TO_SYNC, "convert_frozen_batchnorm", "freeze_batch_norm_2d", "convert_splitbn_model")
_MKLDNN = "torch.utils.mkldnn"
_IN_GRAPHS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
_TAKEN = {"num_features", "running_mean", "running_var"}  # what each of them also reads


class Replaceable(NormMixin):
    """A mixin for BatchNorms. It raises where a bare layer, which would do less, is built to replace this
    one."""

    __jit_unused_properties__ = ("affine",)  # torch.jit.script would compile it

    @property
    def affine(self) -> bool:
        """torch.nn's attribute, as a property. No forward reads it, but all of those functions do: they build
        a bare layer from a BatchNorm's attributes, and call nothing else of it that could raise."""
        if torch.compiler.is_compiling():  # Dynamo cannot trace frames
            if not _IN_GRAPHS:  # torch 2.11's takes a read of __dict__ for a call of this property
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
        """What the bare layer that the function `by` builds would lose, and what to do instead; None for
        nothing."""
        if self.activation is None:
            return None
        return (
            f"applies {self.activation.name} itself, which the layer that {by} builds in its place does not: "
            "make it without activation= and apply that in a module behind it, which bnfast.fuse takes in"
        )


def _builds_another(code: CodeType) -> bool:
    """Whether code belongs to one of those functions, and not to another of the same name. The first of them
    is often copied, so its name is enough."""
    name = code.co_name
    return name == TO_SYNC[0] or (name in _TO_ANOTHER and _TAKEN.issubset(code.co_names))


def _calls_of_itself(frame: FrameType) -> int:
    """The number of consecutive frames, from this one upwards, that run the same function."""
    calls, above = 1, frame.f_back
    while above is not None and above.f_code is frame.f_code:
        calls, above = calls + 1, above.f_back
    return calls
