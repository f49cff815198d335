"""Class conditioning, the same for every family of networks.

The generator receives the latent joined with an embedding of the label; the discriminator uses a projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_gan.models.spectral import SpectralEmbedding, SpectralLinear


def require_labels(labels_B: Tensor | None) -> Tensor:
    """Returns the labels of a class-conditional network; raises ValueError if the caller gave none."""
    if labels_B is None:
        raise ValueError("this network is class-conditional: give labels, int64 of shape (B,)")
    return labels_B


class LatentWithLabel(nn.Module):
    """Joins each latent with an embedding of its label, of equal length: maps latents_BZ and labels_B to shape (B, 2Z).

    Without classes, the latents are returned unchanged.
    """

    def __init__(self, *, latent_dim: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, latent_dim) if classes else None
        self.out_dim = latent_dim * (2 if classes else 1)

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.embedding is None:
            return latents_BZ
        return torch.cat((latents_BZ, self.embedding(require_labels(labels_B))), dim=1)


class ProjectionHead(nn.Module):
    """Maps features_BF and labels_B to logits_B: w . h + b, plus <embedding of the label, h> / sqrt(F).

    h are the F features of an image. Source: Miyato and Koyama 2018. Without classes the second term is absent.
    """

    def __init__(self, *, features: int, classes: int, spectral: bool = False) -> None:
        super().__init__()
        self.linear = (SpectralLinear if spectral else nn.Linear)(features, 1)
        self.embedding = (SpectralEmbedding if spectral else nn.Embedding)(classes, features) if classes else None
        self.scale = features**-0.5

    def forward(self, features_BF: Tensor, labels_B: Tensor | None = None) -> Tensor:
        logits_B = self.linear(features_BF).squeeze(1)
        if self.embedding is not None:
            logits_B = logits_B + (self.embedding(require_labels(labels_B)) * features_BF).sum(dim=1) * self.scale
        return logits_B
