"""The networks whose normalization layers are measured: which layers they have, what follows each, and in
what they are usually run. Plain data, derived from each network's structure; needs nothing but Python.

A shape is the input of a layer. All of a network's layers are of one kind, and its batch is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Shape:
    """The input of a layer, but for the batch. size: height and width, after depth in 3-D. activation and
    residual: what the network does with the result at once, as bnfast's layers name it: act(norm(x) + z)."""

    channels: int
    size: tuple[int, ...]
    activation: str | None = None
    residual: bool = False


@dataclass(frozen=True)
class Network:
    """norm: "BatchNorm", "GroupNorm" or "InstanceNorm". groups: of GroupNorm. layout: what it usually runs
    in, as one of LAYOUTS."""

    name: str
    source: str
    norm: str
    batch: int
    layout: str
    layers: tuple[Shape, ...]
    groups: int = 0

    def groups_of(self, shape: Shape) -> int:
        """The groups of one layer; a GroupNorm of fewer channels than groups has one. BatchNorm: 0."""
        if self.norm == "InstanceNorm":
            return shape.channels
        return 1 if 0 < shape.channels < self.groups else self.groups


def square(channels: int, side: int, activation: str | None = None, residual: bool = False) -> Shape:
    return Shape(channels, (side, side), activation, residual)


def cube(channels: int, side: int, activation: str | None = None) -> Shape:
    return Shape(channels, (side, side, side), activation)


def resnet(blocks: Sequence[int], image: int) -> tuple[Shape, ...]:
    """In order; the second convolution of a stage, but for the first one, halves the image. The third norm of
    a block is followed by the residual add; a stage's first block has one more, on its shortcut."""
    found = [square(64, image // 2, "relu")]
    for stage, count in enumerate(blocks):
        width, side = 64 << stage, image >> (2 + stage)
        first = square(width, 2 * side if stage else side, "relu")
        inner, last = square(width, side, "relu"), square(4 * width, side, "relu", residual=True)
        found += [first, inner, last, square(4 * width, side)]
        found += [inner, inner, last] * (count - 1)
    return tuple(found)


def blocks(inputs: Sequence[int], width: int, side: int, attention: bool = False) -> list[Shape]:
    """Residual blocks, one from each of these numbers of channels to `width`. SiLU follows the norms before
    the two convolutions of a block; what attends after it has a norm alone."""
    found = []
    for channels in inputs:
        found += [square(channels, side, "silu"), square(width, side, "silu")]
        found += [square(width, side)] * attention
    return found


def middle(channels: int, side: int) -> list[Shape]:
    """Two residual blocks with attention between them."""
    return blocks([channels], channels, side, True) + blocks([channels], channels, side)


def diffusion_unet(widths: Sequence[int], attending: Sequence[int], latent: int) -> tuple[Shape, ...]:
    """Two residual blocks a level on the way down, three on the way up, where each takes over the result of
    one on the way down. attending: the levels whose blocks are followed by a transformer."""
    channels, kept, found = widths[0], [widths[0]], []
    for level, width in enumerate(widths):
        found += blocks([channels, width], width, latent >> level, level in attending)
        # the third is the result of the convolution that halves the image
        kept += [width] * (3 if level < len(widths) - 1 else 2)
        channels = width
    found += middle(channels, latent >> level)
    for level, width in reversed(list(enumerate(widths))):
        joined = [before + kept.pop() for before in (channels, width, width)]
        found += blocks(joined, width, latent >> level, level in attending)
        channels = width
    return (*found, square(channels, latent, "silu"))


def diffusion_decoder(widths: Sequence[int], latent: int) -> tuple[Shape, ...]:
    """The middle, then three residual blocks a level, each level of twice the side."""
    channels, found = widths[0], middle(widths[0], latent)
    for level, width in enumerate(widths):
        found += blocks([channels, width, width], width, latent << level)
        channels = width
    return (*found, square(channels, latent << level, "silu"))


def volumes_after(widths: Sequence[int], side: int) -> tuple[Shape, ...]:
    """A 3-D U-Net of two convolutions a level, each normalized after, with leaky ReLU: down, and up again."""
    down = [cube(width, side >> level, "leaky_relu") for level, width in enumerate(widths) for _ in range(2)]
    return (*down, *reversed(down[:-2]))


def volumes_before(widths: Sequence[int], side: int) -> tuple[Shape, ...]:
    """A 3-D U-Net of two convolutions a level, each normalized before. Down, the first one of a level has
    half as many outputs as the level, but no fewer than inputs; up, its inputs are joined by those of the way
    down."""
    found, channels = [], 1
    for level, width in enumerate(widths):
        found += [cube(channels, side >> level), cube(max(channels, width // 2), side >> level)]
        channels = width
    for level, width in reversed(list(enumerate(widths[:-1]))):
        found += [cube(channels + width, side >> level), cube(width, side >> level)]
        channels = width
    return tuple(found)


RESNET50 = Network(
    "ResNet-50", "He et al. 2015, arXiv 1512.03385, table 1; images of 224x224",
    "BatchNorm", 256, "channels_last", resnet((3, 4, 6, 3), 224),
)  # fmt: skip
TINY = "the layers of ResNet-50 at a batch of 4: tensors of at most 7 MB, where launching counts"
SMALL = replace(RESNET50, name="Small ResNet-50", source=TINY, batch=4)
SD15_UNET = Network(
    "SD 1.5 UNet",
    "Stable Diffusion 1.5, Rombach et al. 2022, arXiv 2112.10752; latents of 64x64, widths as in its "
    "published configuration",
    "GroupNorm", 16, "contiguous", diffusion_unet((320, 640, 1280, 1280), (0, 1, 2), 64), 32,
)  # fmt: skip
SDXL_UNET = Network(
    "SDXL UNet",
    "Podell et al. 2023, arXiv 2307.01952; latents of 128x128, widths as in its published configuration",
    "GroupNorm", 2, "contiguous", diffusion_unet((320, 640, 1280), (1, 2), 128), 32,
)  # fmt: skip
SD15_VAE = Network(
    "SD 1.5 VAE decoder",
    "the decoder of Stable Diffusion 1.5, arXiv 2112.10752; images of 512x512",
    "GroupNorm", 1, "contiguous", diffusion_decoder((512, 512, 256, 128), 64), 32,
)  # fmt: skip
SDXL_VAE = Network(
    "SDXL VAE decoder", "the decoder of SDXL, arXiv 2307.01952; images of 1024x1024",
    "GroupNorm", 1, "contiguous", diffusion_decoder((512, 512, 256, 128), 128), 32,
)  # fmt: skip
NNUNET = Network(
    "nnU-Net 3-D",
    "Isensee et al. 2021, arXiv 1904.08128: the 3-D network of full resolution, patches of 128x128x128",
    "InstanceNorm", 2, "contiguous", volumes_after((32, 64, 128, 256, 320, 320), 128),
)  # fmt: skip
UNET3D = Network(
    "3-D U-Net",
    "Cicek et al. 2016, arXiv 1606.06650, with GroupNorm as in the pytorch-3dunet package (its order "
    "'gcr', 32 feature maps); volumes of 128x128x128",
    "GroupNorm", 1, "contiguous", volumes_before((32, 64, 128, 256), 128), 8,
)  # fmt: skip

SUITES: dict[str, tuple[Network, ...]] = {
    "resnet50": (RESNET50,),
    "sd-unet": (SD15_UNET, SDXL_UNET),
    "sd-vae": (SD15_VAE, SDXL_VAE),
    "unet3d": (NNUNET, UNET3D),
    "small": (SMALL,),
}
