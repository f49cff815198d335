"""Pure networks, one file a family. A generator maps (latents_BZ, labels_B) to images, a discriminator
(images, labels_B) to logits_B; neither knows of losses, devices or ranks."""

from __future__ import annotations

import torch
from torch import nn

from dist_gan.config import ArticleNetworks, DCGANNetworks, MLPNetworks
from dist_gan.models import article, dcgan, mlp
from dist_gan.types import Networks

AnyNetworks = ArticleNetworks | DCGANNetworks | MLPNetworks


def build_generator(section: AnyNetworks) -> nn.Module:
    """The generator of a kind, with the weights that torch's global generator gives."""
    match section:
        case ArticleNetworks():
            return article.Generator(
                latent_dim=section.latent_dim,
                resolution=section.resolution,
                channels=section.channels,
                classes=section.classes,
            )
        case DCGANNetworks():
            return dcgan.Generator(
                latent_dim=section.latent_dim,
                resolution=section.resolution,
                channels=section.channels,
                classes=section.classes,
                width=section.g_width,
                norm=section.g_norm,
                mapping=section.g_mapping,
                smooth=section.g_smooth,
            )
        case MLPNetworks():
            return mlp.Generator(
                latent_dim=section.latent_dim, classes=section.classes, width=section.width, depth=section.depth
            )


def build_discriminator(section: AnyNetworks) -> nn.Module:
    """The discriminator of a kind, with the weights that torch's global generator gives."""
    match section:
        case ArticleNetworks():
            return article.Discriminator(
                resolution=section.resolution,
                channels=section.channels,
                classes=section.classes,
                dropout=section.dropout,
            )
        case DCGANNetworks():
            return dcgan.Discriminator(
                resolution=section.resolution,
                channels=section.channels,
                classes=section.classes,
                width=section.d_width,
                norm=section.d_norm,
                stddev_group=section.d_stddev,
            )
        case MLPNetworks():
            return mlp.Discriminator(classes=section.classes, width=section.width, depth=section.depth)


def build_networks(section: AnyNetworks, *, seed: int) -> Networks:
    """Both players, their weights a function of `seed`; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Networks(generator=build_generator(section), discriminator=build_discriminator(section))


def count_parameters(network: nn.Module) -> int:
    """Numbers that are learned."""
    return sum(p.numel() for p in network.parameters())


def sizes(section: AnyNetworks) -> tuple[int, int]:
    """Numbers of parameters of generator and discriminator, computed without allocating memory for them."""
    with torch.device("meta"):
        networks = build_networks(section, seed=0)
    return count_parameters(networks.generator), count_parameters(networks.discriminator)
