"""Two perceptrons for points in the plane, on which the game itself can be watched."""

from __future__ import annotations

from torch import Tensor, nn

from dist_gan.models.conditioning import LatentWithLabel, ProjectionHead


def _hidden(in_dim: int, *, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(in_dim, width), nn.LeakyReLU(0.2)]
        in_dim = width
    return nn.Sequential(*layers)


class Generator(nn.Module):
    """BZ -> B2, points without bounds."""

    def __init__(self, *, latent_dim: int = 16, classes: int = 0, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.label = LatentWithLabel(latent_dim=latent_dim, classes=classes)
        self.hidden = _hidden(self.label.out_dim, width=width, depth=depth)
        self.out = nn.Linear(width, 2)

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.out(self.hidden(self.label(latents_BZ, labels_B)))


class Discriminator(nn.Module):
    """B2 -> logits_B."""

    def __init__(self, *, classes: int = 0, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.hidden = _hidden(2, width=width, depth=depth)
        self.head = ProjectionHead(features=width, classes=classes)

    def forward(self, images_B2: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(images_B2), labels_B)
