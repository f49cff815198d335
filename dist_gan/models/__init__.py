"""Generators and discriminators, one file per family of networks.

A generator maps (latents_BZ, labels_B) to images, a discriminator maps (images, labels_B) to logits_B. The networks
know no losses, devices or ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_gan.models.article import ARTICLE
from dist_gan.models.dcgan import DCGAN
from dist_gan.models.family import Family, NetworkSettings, PictureNetworks
from dist_gan.models.mlp import MLP
from dist_gan.models.own import OWN, OwnBuilder, OwnNetworks, build_own
from dist_gan.types import Networks, UserError

FAMILIES: dict[str, Family[Any]] = {
    "article": ARTICLE,
    "dcgan": DCGAN,
    "mlp": MLP,
    "own": OWN,
}
"""Families of networks by name; the setting `networks.kind` chooses one."""


def families_for(made: str) -> str:
    """Returns the names of the families whose generator makes `images` or `points`, joined by "or"."""
    return " or ".join(kind for kind, family in FAMILIES.items() if family.makes == made)


def picture_networks(section: NetworkSettings) -> PictureNetworks:
    """Returns the settings unchanged if they are of networks for images.

    Raises:
        UserError: the networks are for points.
    """
    if isinstance(section, PictureNetworks):
        return section
    raise UserError(f"networks.kind: {section.kind!r} is for points; images go with {families_for('images')}")


def build_generator(section: NetworkSettings) -> nn.Module:
    """Builds the generator of the family `section.kind`, with weights drawn from torch's global random generator."""
    return FAMILIES[section.kind].build_generator(section)


def build_discriminator(section: NetworkSettings) -> nn.Module:
    """Builds the discriminator of the family `section.kind`, with weights drawn from torch's global random generator."""
    return FAMILIES[section.kind].build_discriminator(section)


def build_networks(section: NetworkSettings, *, seed: int, own: OwnBuilder | None = None) -> Networks:
    """Builds generator and discriminator with weights that depend on `seed` alone.

    The state of torch's global random generator is restored.

    Args:
        section: settings of the networks.
        seed: random seed of the weights.
        own: the user's function that builds networks of the kind `own`.

    Raises:
        UserError: the kind is `own`, and the function is missing or does not return two networks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if own is not None and isinstance(section, OwnNetworks):
            return build_own(own, section)
        return Networks(generator=build_generator(section), discriminator=build_discriminator(section))


def count_parameters(network: nn.Module) -> int:
    """Returns the number of learned numbers in a network."""
    return sum(p.numel() for p in network.parameters())


def sizes(section: NetworkSettings, *, own: OwnBuilder | None = None) -> tuple[int, int]:
    """Returns the numbers of parameters of generator and discriminator, without allocating memory for the parameters."""
    with torch.device("meta"):
        networks = build_networks(section, seed=0, own=own)
    return count_parameters(networks.generator), count_parameters(networks.discriminator)
