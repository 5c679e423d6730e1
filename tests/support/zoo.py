"""torchvision's and timm's models, where these are installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

_declared: list[torch.library.Library] = []


def installed(name: str) -> ModuleType:
    """torchvision or timm (which imports torchvision); skips the test that asks where it is missing.

    torchvision's operators are compiled for one build of torch. With another it does not import, since it
    describes operators that are not there; the models need none, so declaring those is enough."""
    try:
        return pytest.importorskip(name)
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
    for operator in ("nms", "qnms"):
        _declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name)
