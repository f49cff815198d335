"""Two multilayer perceptrons as generator and discriminator of points in the plane, for studies of GAN dynamics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from dist_gan.config.values import Count, Section
from dist_gan.models.conditioning import LatentWithLabel, ProjectionHead
from dist_gan.models.family import Family


class MLPNetworks(Section):
    """Two multilayer perceptrons, for data that are points in the plane."""

    kind: Literal["mlp"] = "mlp"
    """Name of this family of networks: dense layers with LeakyReLU, for points in the plane."""
    classes: Annotated[Count, Field(ge=0, le=100_000)] = 0
    """Number of classes of class-conditional networks; 0 makes the networks unconditional."""
    latent_dim: Annotated[Count, Field(ge=1, le=2**16)] = 16
    """Length of the latent vector that the generator receives."""
    width: Annotated[Count, Field(ge=1, le=2**16)] = 128
    """Number of units in each hidden layer of both networks."""
    depth: Annotated[Count, Field(ge=1, le=256)] = 3
    """Number of hidden layers of each network."""


def _hidden(in_dim: int, *, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(in_dim, width), nn.LeakyReLU(0.2)]
        in_dim = width
    return nn.Sequential(*layers)


class Generator(nn.Module):
    """Generator: maps latents_BZ to points_B2, with unbounded coordinates."""

    def __init__(self, section: MLPNetworks) -> None:
        super().__init__()
        self.latent_dim = section.latent_dim
        self.label = LatentWithLabel(latent_dim=section.latent_dim, classes=section.classes)
        self.hidden = _hidden(self.label.out_dim, width=section.width, depth=section.depth)
        self.out = nn.Linear(section.width, 2)

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.out(self.hidden(self.label(latents_BZ, labels_B)))


class Discriminator(nn.Module):
    """Discriminator: maps points_B2 to logits_B."""

    def __init__(self, section: MLPNetworks) -> None:
        super().__init__()
        self.hidden = _hidden(2, width=section.width, depth=section.depth)
        self.head = ProjectionHead(features=section.width, classes=section.classes)

    def forward(self, images_B2: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(images_B2), labels_B)


MLP = Family(MLPNetworks, build_generator=Generator, build_discriminator=Discriminator)
