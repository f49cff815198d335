"""Samples of a generator, and pictures of them: images, density pictures of points, grids from fixed latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_gan.draws import Draws
from dist_gan.types import byte_range

Pictures = NDArray[np.uint8]


@torch.no_grad()
def sample(
    generator: nn.Module,
    draws: Draws,
    *,
    slots: Tensor,
    classes: int = 0,
    label: int | None = None,
    draw: int = 0,
    purpose: str = "samples",
    batch: int = 250,
) -> Iterator[Tensor]:
    """Yields samples of a generator in evaluation mode, in batches on its device.

    Args:
        generator: network with the attribute `latent_dim`.
        draws: random numbers of the run.
        slots: numbers of the samples, int64; each number has latents of its own.
        classes: number of classes of a conditional generator, 0 for none; slot i gets class i % classes.
        label: class of every sample; None to take the classes in turn.
        draw: number that selects another set of latents.
        purpose: name that selects another set of latents.
        batch: number of samples made at a time.
    """
    latent_dim = int(generator.latent_dim)  # type: ignore[arg-type]
    for part in slots.split(batch):
        latents = draws.normal(f"latents/{purpose}", draw=draw, slots=part, shape=(latent_dim,))
        labels = None
        if classes:
            labels = (part % classes if label is None else torch.full_like(part, label)).to(latents.device)
        yield generator(latents, labels)


def to_pictures(samples: Tensor) -> Pictures:
    """Converts images in [-1, 1], BCHW, or points in [-1, 1], B2, to uint8 NHWC; points become one density picture."""
    if samples.dim() == 2:
        return density(samples.float().cpu().numpy())[None]
    return byte_range(samples).permute(0, 2, 3, 1).cpu().numpy()


def density(points_N2: NDArray[np.float32], *, side: int = 256) -> Pictures:
    """Draws points of [-1, 1]^2 as a grey picture that is darker where there are more points."""
    counts, _, _ = np.histogram2d(-points_N2[:, 1], points_N2[:, 0], bins=side, range=[[-1, 1], [-1, 1]])
    shade = 255.0 * np.exp(-counts / max(1.0, counts.max() / 4))
    return np.repeat(shade.astype(np.uint8)[..., None], 3, axis=2)


def fixed_grid(generator: nn.Module, draws: Draws, *, count: int, classes: int) -> Pictures:
    """Returns pictures of `count` samples, whose latents are the same at every call."""
    return to_pictures(torch.cat(list(sample(generator, draws, slots=torch.arange(count), classes=classes))))
