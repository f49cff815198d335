"""DCGAN networks (Radford, Metz, Chintala 2016) for square images of 16 to 256 pixels a side.

Generator: a 4x4 transposed convolution of the latent, then 4x4 stride-2 stages; ReLU; tanh at the end.
Discriminator: 4x4 stride-2 convolutions down to 4x4 pixels, with LeakyReLU 0.2. With batch normalisation these are the
paper's networks: weights N(0, 0.02), no normalisation at the generator's output and the discriminator's input, no bias
before a normalisation. Without batch normalisation nothing rescales the activations, so weights are He-normal instead (He
et al. 2015). With `spectral` every weight of the discriminator is also divided by its largest singular value (Miyato et
al. 2018).

Two additions from StyleGAN are options: dense layers before the first stage (Karras et al. 2019, section 2), and the
minibatch standard deviation at the discriminator's end (Karras et al. 2018, section 3). A third, `smooth`, is an
initialisation of the generator: its first images are smooth fields of colour instead of white noise. Photographs of 64
pixels or more are smooth, so a discriminator learns within a few updates to tell white noise from them by one filter,
and the generator stops learning.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_gan.config.values import Count
from dist_gan.models.conditioning import LatentWithLabel, ProjectionHead
from dist_gan.models.family import BatchDependence, Family, PictureNetworks
from dist_gan.models.spectral import SpectralConv2d, begin_spectral

Norm = Literal["batch", "none", "spectral"]
"""Kind of normalisation layers; `spectral` is for the discriminator only."""
MAPPING_WIDTH = 128


class DCGANNetworks(PictureNetworks):
    """DCGAN (Radford et al. 2016) for square images of 16 to 256 pixels a side."""

    kind: Literal["dcgan"] = "dcgan"
    """Name of this family of networks: DCGAN, with strided convolutions in both networks."""
    resolution: Literal[16, 32, 64, 128, 256] = 32
    """Width and height of the images, in pixels."""
    g_width: Annotated[Count, Field(ge=1, le=4096)] = 64
    """Number of channels of the generator's feature map with the highest resolution.

    The number doubles with each halving of the resolution, up to 8 times this value.
    """
    d_width: Annotated[Count, Field(ge=1, le=4096)] = 64
    """Number of channels of the discriminator's first layer.

    The number doubles with each halving of the resolution, up to 8 times this value.
    """
    g_norm: Literal["batch", "none"] = "batch"
    """Normalisation layers in the generator: `batch` for batch normalisation, `none` for none."""
    d_norm: Literal["batch", "none", "spectral"] = "batch"
    """Normalisation in the discriminator: `batch` normalises activations, `spectral` normalises weights.

    With `batch`, gradient penalties are refused, because they need a logit that depends on one image alone.
    """
    g_mapping: Annotated[Count, Field(ge=0, le=8)] = 0
    """Number of dense layers, of 128 units each, that transform the latent before the generator's first convolution.

    They form a mapping network as in StyleGAN, with which a generator separates the modes of the data more easily. 0
    omits it.
    """
    g_smooth: bool = False
    """Smooth initialisation: the generator's upsampling layers begin as bilinear interpolation.

    The samples of the untrained generator are then smooth instead of white noise.
    """
    d_stddev: Annotated[Count, Field(ge=0, le=2**20)] = 0
    """Group size, in images, of the minibatch standard deviation layer in the discriminator; 0 omits the layer."""


def _widths(width: int, *, resolution: int) -> list[int]:
    """Returns the number of channels of each feature map, from half the image's side down to 4x4 pixels.

    The number doubles at each halving of the side, up to 8 times `width`.
    """
    return [width * min(2**i, 8) for i in range(int(math.log2(resolution)) - 2)]


def _initialise(network: nn.Module, *, norm: Norm, slope: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if norm == "batch":
                nn.init.normal_(module.weight, 0.0, 0.02)
            else:
                _he_normal(module, slope=slope)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)


def _he_normal(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, *, slope: float) -> None:
    """Draws a weight from N(0, gain^2 / fan-in), where fan-in is the number of inputs that one output sums over."""
    fan_in = module.weight[0].numel()
    if isinstance(module, nn.ConvTranspose2d):
        taps = module.kernel_size[0] * module.kernel_size[1] / (module.stride[0] * module.stride[1])
        fan_in = int(module.in_channels * (1 if isinstance(module, GrowFromPoint) else taps))
    nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (1.0 + slope**2) / fan_in))


def _smooth(network: nn.Module) -> None:
    """Initialises each stride-2 stage as bilinear upsampling by a factor of two, with randomly mixed channels.

    Each 4x4 kernel is the outer product of [1, 3, 3, 1] / 4 with itself, which interpolates at stride 2 (the filter of
    Karras et al. 2020, StyleGAN2, section 4.1), times N(0, gain^2 / channels) for each pair of channels.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d) and module.stride == (2, 2):
            pairs = torch.randn(module.in_channels, module.out_channels, 1, 1)
            gain = math.sqrt(2.0 / (1.0 + 0.2**2) / module.in_channels)
            with torch.no_grad():
                module.weight.copy_(gain * pairs * torch.outer(taps, taps))


class MinibatchStdDev(nn.Module):
    """Appends one channel with the standard deviation within groups of images: maps BCHW to shape (B, C + 1, H, W).

    The standard deviation over the images of a group is averaged over channels (Karras et al. 2018, section 3). A group
    consists of every (B / group)-th image. The channel of an image thus depends on other images of the same process and
    micro-batch.
    """

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, features_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = features_BCHW.shape
        group = math.gcd(batch, self.group)
        grouped = features_BCHW.reshape(group, batch // group, channels, height, width)
        centred = grouped - grouped.mean(dim=0)  # computed by hand, since Tensor.var is ten times slower on a CPU
        spread = (centred.square().mean(dim=0) + 1e-8).sqrt().mean(dim=1, keepdim=True)
        return torch.cat((features_BCHW, spread.repeat(group, 1, 1, 1)), dim=1)


class GrowFromPoint(nn.ConvTranspose2d):
    """4x4 transposed convolution of one pixel, computed as a matrix product: maps shape (B, C, 1, 1) to (B, C', 4, 4)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 4, bias=bias)

    def forward(self, features_BC11: Tensor, output_size: list[int] | None = None) -> Tensor:
        features_BCHW = (features_BC11.flatten(1) @ self.weight.flatten(1)).unflatten(1, (-1, 4, 4))
        return features_BCHW if self.bias is None else features_BCHW + self.bias[:, None, None]


class Generator(nn.Module):
    """Generator: maps latents_BZ to images_BCHW in [-1, 1]."""

    def __init__(self, section: DCGANNetworks) -> None:
        super().__init__()
        latent_dim, norm = section.latent_dim, section.g_norm
        self.latent_dim = latent_dim
        self.label = LatentWithLabel(latent_dim=latent_dim, classes=section.classes)
        dense = [self.label.out_dim] + section.g_mapping * [MAPPING_WIDTH]
        self.mapping = nn.Sequential(
            *(layer for a, b in pairwise(dense) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2)))
        )
        widths = _widths(section.g_width, resolution=section.resolution)[::-1]
        stages: list[nn.Module] = []
        previous = dense[-1]
        for index, out in enumerate(widths):
            bias = norm == "none"
            stages.append(
                nn.ConvTranspose2d(previous, out, 4, 2, 1, bias=bias)
                if index
                else GrowFromPoint(previous, out, bias=bias)
            )
            stages += [nn.BatchNorm2d(out), nn.ReLU()] if norm == "batch" else [nn.LeakyReLU(0.2)]
            previous = out
        stages += [nn.ConvTranspose2d(previous, section.channels, 4, 2, 1), nn.Tanh()]
        self.stages = nn.Sequential(*stages)
        _initialise(self.stages, norm=norm, slope=0.2)
        _initialise(self.mapping, norm="none", slope=0.2)  # no norm follows a dense layer
        if section.g_smooth:
            _smooth(self.stages)

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.stages(self.mapping(self.label(latents_BZ, labels_B))[:, :, None, None])


class Discriminator(nn.Module):
    """Discriminator: maps images_BCHW to logits_B.

    The paper's last layer, a 4x4 convolution to one logit, is written as a dense layer with the same weights, to which
    class conditioning adds a projection of the label.
    """

    def __init__(self, section: DCGANNetworks) -> None:
        super().__init__()
        norm, stddev_group = section.d_norm, section.d_stddev
        widths = _widths(section.d_width, resolution=section.resolution)
        stages: list[nn.Module] = []
        previous: int = section.channels
        for index, out in enumerate(widths):
            normed = norm == "batch" and index > 0
            stages.append(
                (SpectralConv2d if norm == "spectral" else nn.Conv2d)(previous, out, 4, 2, 1, bias=not normed)
            )
            stages += [nn.BatchNorm2d(out)] if normed else []
            stages.append(nn.LeakyReLU(0.2))
            previous = out
        stages += [MinibatchStdDev(stddev_group)] if stddev_group else []
        self.stages = nn.Sequential(*stages, nn.Flatten())
        features = 16 * (previous + (1 if stddev_group else 0))
        self.head = ProjectionHead(features=features, classes=section.classes, spectral=norm == "spectral")
        _initialise(self, norm=norm, slope=0.2)
        begin_spectral(self)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.head(self.stages(images_BCHW), labels_B)


def _batch_dependence(section: DCGANNetworks) -> BatchDependence | None:
    return BatchDependence("d_norm", instead="none") if section.d_norm == "batch" else None


DCGAN = Family(
    DCGANNetworks, build_generator=Generator, build_discriminator=Discriminator, batch_dependence=_batch_dependence
)
