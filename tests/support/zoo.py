"""torchvision's and timm's models, where these are installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

_declared: list[torch.library.Library] = []


def _torchvision_without_operators() -> None:
    """Its operators are compiled for one build of torch. With another it does not import, since it describes
    operators that are not there; the models need none, so declaring those is enough."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def installed(name: str) -> ModuleType:
    """torchvision or timm (which imports torchvision); skips the test that asks where it is missing."""
    try:
        return pytest.importorskip(name)
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        _torchvision_without_operators()
        return pytest.importorskip(name)
