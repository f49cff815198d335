"""Generator and discriminator of the article on GANs from which this project started, with the same layers.

The text of the article says 64x64 pixels, but its printed strides (1, 2, 2, 2 from 4x4) give 32x32. At 32 pixels this
is the printed network; at 64 pixels the generator has one more stage of stride 2. The article uses Keras: its momentum
0.8 is 0.2 in torch, and its epsilon 1e-3 and its initialisation (Glorot uniform, biases 0) are kept. Keras'
`padding="same"` of a 4x4 kernel is 1 at the start and 2 at the end for stride 1, and 1 on both sides for stride 2.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from dist_gan.config.values import Real
from dist_gan.models.conditioning import LatentWithLabel, ProjectionHead
from dist_gan.models.family import Family, PictureNetworks


class ArticleNetworks(PictureNetworks):
    """Networks of an article on how GANs fail: dense layers and transposed convolutions in the generator."""

    kind: Literal["article"] = "article"
    """Name of this family of networks: the article's networks as printed, which make images of 32x32 pixels.

    At 64x64 pixels, the generator has one additional stage of stride 2.
    """
    resolution: Literal[32, 64] = 32
    """Width and height of the images, in pixels."""
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.3
    """Dropout probability in the discriminator; 0 turns dropout off."""


def _batch_norm(channels: int, *, pictures: bool) -> nn.Module:
    kind = nn.BatchNorm2d if pictures else nn.BatchNorm1d
    return kind(channels, eps=1e-3, momentum=0.2)


def _glorot(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class SameTransposed(nn.Module):
    """Applies a 4x4 transposed convolution of stride 1 that keeps height and width.

    The full result is 3 pixels wider and higher: 1 row or column is cut off at the start, and 2 at the end.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.conv(images_BCHW)[:, :, 1:-2, 1:-2]


class Generator(nn.Module):
    """Generator: maps latents_BZ to images_BCHW in [-1, 1]."""

    def __init__(self, section: ArticleNetworks) -> None:
        super().__init__()
        self.latent_dim = section.latent_dim
        self.label = LatentWithLabel(latent_dim=section.latent_dim, classes=section.classes)
        dense: list[nn.Module] = []
        width = self.label.out_dim
        for out in (256, 512, 1024):
            dense += [nn.Linear(width, out), nn.LeakyReLU(0.2), _batch_norm(out, pictures=False)]
            width = out
        self.dense = nn.Sequential(*dense, nn.Linear(width, 4 * 4 * 512), nn.ReLU())
        stages: list[nn.Module] = [SameTransposed(512, 256), nn.ReLU(), _batch_norm(256, pictures=True)]
        widths = {32: (256, 128, 64), 64: (256, 128, 64, 32)}[section.resolution]
        for width, out in pairwise(widths):
            stages += [nn.ConvTranspose2d(width, out, 4, 2, 1), nn.ReLU(), _batch_norm(out, pictures=True)]
        self.stages = nn.Sequential(*stages, nn.ConvTranspose2d(widths[-1], section.channels, 4, 2, 1), nn.Tanh())
        _glorot(self)

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        dense = self.dense(self.label(latents_BZ, labels_B))
        return self.stages(dense.view(-1, 512, 4, 4))


class Discriminator(nn.Module):
    """Discriminator: maps images_BCHW to logits_B."""

    def __init__(self, section: ArticleNetworks) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Conv2d(section.channels, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(section.dropout),
            nn.Conv2d(64, 128, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(section.dropout),
            nn.Flatten(),
        )  # fmt: skip
        self.head = ProjectionHead(features=128 * (section.resolution // 4) ** 2, classes=section.classes)
        _glorot(self)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.head(self.stages(images_BCHW), labels_B)


ARTICLE = Family(ArticleNetworks, build_generator=Generator, build_discriminator=Discriminator)
