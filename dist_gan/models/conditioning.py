"""Class conditioning, the same for every family: the label joins the latent, and the logit by projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_gan.models.spectral import SpectralEmbedding, SpectralLinear


def require_labels(labels_B: Tensor | None) -> Tensor:
    """The labels of a conditional network; leaving them out is the caller's mistake."""
    if labels_B is None:
        raise ValueError("this network is class-conditional: give labels, int64 of shape (B,)")
    return labels_B


class LatentWithLabel(nn.Module):
    """Latent of Z numbers, joined with an embedding of as many numbers as the class: BZ, B -> B(2Z)."""

    def __init__(self, *, latent_dim: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, latent_dim) if classes else None
        self.out_dim = latent_dim * (2 if classes else 1)

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.embedding is None:
            return latents_BZ
        return torch.cat((latents_BZ, self.embedding(require_labels(labels_B))), dim=1)


class ProjectionHead(nn.Module):
    """Logit of features: w . h + b, plus <embedding of the class, h> / sqrt(F) (Miyato and Koyama 2018): BF, B -> B."""

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
