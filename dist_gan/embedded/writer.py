"""Writes the embedded data set as shards: draws the pictures, and packs them like any other images."""

from __future__ import annotations

from dist_gan.embedded.shapes import CLASS_NAMES, draw_shapes
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack

PICTURES_SEED = 2026
"""Seed of the pictures, the same for every run; the order of the pictures depends on the seed of the run."""


def write_shapes(url: str, *, count: int) -> None:
    """Draws the first `count` pictures of the embedded data set, and packs them into a folder of shards.

    A folder that already holds these shards is left unchanged, and an interrupted pack is completed.

    Raises:
        TrainingFailed: the shards cannot be written.
    """
    images, labels = draw_shapes(count, seed=PICTURES_SEED)
    pack(ArraySource(images, labels, class_names=CLASS_NAMES), url, workers=1)
