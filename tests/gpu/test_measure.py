"""The benchmarks' clock on a GPU: every kind of layer, in both layouts and as the suites measure it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure, suites
from benchmarks.suites import Network, Shape
from tests.gpu import parity

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", suites.LAYOUTS)
@pytest.mark.parametrize(
    "network", [suites.RESNET50, suites.SDXL_UNET, suites.NNUNET, suites.UNET3D], ids=lambda n: n.file
)
def test_layers_are_timed(network: Network, layout: str, dtype: torch.dtype) -> None:
    """torch's takes the types that it is given; and no backward is quicker than its bytes could ever be."""
    shape = Shape(64, (96, 96) if len(network.layers[0].size) == 2 else (24, 24, 16))
    pair = measure.makers(network, shape, dtype, parity.device())
    size = (16, shape.channels, *shape.size)
    found = measure.compare(*pair, size, dtype, layout == "channels_last", parity.device())
    impossible = 3 * shape.bytes(16, 2) / 100e12 * 1e6  # microseconds, at 100 TB/s
    for times in found:
        assert times.forward > 0
        assert times.backward > impossible
    assert found[0].backend == "bnfast"
    assert found[1].backend in ("Native", "Cudnn")
