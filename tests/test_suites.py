"""The networks whose layers are measured: what they consist of, and what is counted of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, predict, suites
from benchmarks.suites import SUITES, Network, Shape, cube, square
from codegen.cases import DIRECTIONS

NETWORKS = [network for networks in SUITES.values() for network in networks]
EVERY = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.file)
LAYOUTS = pytest.mark.parametrize("layout", suites.LAYOUTS)


# what they consist of


@pytest.mark.parametrize(("file", "layers", "distinct", "total"), [
    ("resnet50", 53, 12, 5_690_359_808), ("sd15-unet", 61, 14, 1_441_792_000),
    ("sdxl-unet", 46, 12, 618_659_840), ("sd15-vae", 30, 6, 918_552_576),
    ("sdxl-vae", 30, 6, 3_674_210_304), ("nnunet3d", 22, 6, 1_428_848_640), ("unet3d", 14, 11, 819_986_432),
])  # fmt: skip
def test_layers_are_known(file: str, layers: int, distinct: int, total: int) -> None:
    network = next(network for network in NETWORKS if network.file == file)
    assert (len(network.layers), len({shape.alone for shape in network.layers})) == (layers, distinct)
    assert sum(shape.bytes(network.batch, 2) for shape in network.layers) == total


@pytest.mark.parametrize(("network", "shape", "times"), [
    (suites.RESNET50, square(64, 112), 1),
    (suites.RESNET50, square(256, 56), 4),  # three blocks and one way round
    (suites.RESNET50, square(2048, 7), 4),
    (suites.SD15_UNET, square(960, 64), 1),  # where 640 channels meet 320 of the way down
    (suites.SD15_UNET, square(2560, 8), 3),
    (suites.SDXL_UNET, square(1280, 32), 16),
    (suites.SDXL_VAE, square(128, 1024), 6),
    (suites.NNUNET, cube(320, 4), 2),
    (suites.UNET3D, cube(96, 128), 1),
], ids=str)  # fmt: skip
def test_a_shape_occurs_so_often(network: Network, shape: Shape, times: int) -> None:
    assert [each.alone for each in network.layers].count(shape) == times


@EVERY
def test_groups_divide_channels(network: Network) -> None:
    """In torch too: its own layers accept all of them."""
    for shape in set(network.layers):
        groups = network.groups_of(shape)
        assert (groups == 0) == (network.norm == "BatchNorm")
        assert groups == 0 or shape.channels % groups == 0


def test_what_follows_is_known() -> None:
    """16 blocks of ResNet-50 add before the last ReLU; four ways round have a norm alone."""
    layers = suites.RESNET50.layers
    assert [sum(s.after == after for s in layers) for after in (" relu", " + z relu", "")] == [33, 16, 4]
    assert {s.activation for s in suites.SD15_UNET.layers} == {"silu", None}
    assert {s.activation for s in suites.NNUNET.layers} == {"leaky_relu"}


# what is counted


@EVERY
@LAYOUTS
def test_counted_bytes_are_the_sweeps_and_little_more(network: Network, layout: str) -> None:
    found = cases.of_network("suite", network, torch.bfloat16, layout == "channels_last")
    assert sum(case.count for case in found) == len(network.layers)
    for case in found:
        moved, launches = predict.counted(case, "forward")
        back, launches_back = predict.counted(case, "backward")
        swept, swept_back = launches == 2, launches_back == 3
        if network.norm == "BatchNorm":
            swept_back = launches_back == 2
        assert swept or layout == "contiguous"
        sweeps, sweeps_back = (3 if swept else 2) + case.residual, (5 if swept_back else 3) + case.residual
        # cells of 64 values hand over a good part of what they are; those that matter do not
        spare = 1.04 if case.x_bytes > 5e7 else 1.7
        assert sweeps * case.x_bytes <= moved <= spare * sweeps * case.x_bytes
        assert sweeps_back * case.x_bytes <= back <= spare * sweeps_back * case.x_bytes


def test_small_contiguous_groups_are_read_once() -> None:
    found = cases.of_network("sd-unet", suites.SD15_UNET, torch.bfloat16, channels_last=False)
    launches = {
        case.shape[1:]: tuple(predict.counted(case, way)[1] for way in DIRECTIONS)
        for case in found
        if case.activation is None
    }
    assert launches[1280, 16, 16] == (1, 2)
    assert launches[320, 64, 64] == (1, 3)  # 80 KB of x, and not as much of x and dy
    assert launches[640, 32, 32] == (1, 3)
