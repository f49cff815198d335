"""The embedded data set as shards: pictures of shapes, drawn on the spot and packed like any other images."""

from __future__ import annotations

from dist_gan.embedded.shapes import CLASS_NAMES, draw_shapes
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack

PICTURES_SEED = 2026
"""Seed of the pictures, the same for every run; the seed of a run decides their order and everything else."""


def write_shapes(url: str, *, count: int) -> None:
    """Draws the first `count` pictures of the embedded data set, and packs them into a folder of shards.

    A folder that holds these shards already is left as it is, and an interrupted pack is finished.

    Raises:
        TrainingFailed: the shards cannot be written.
    """
    images, labels = draw_shapes(count, seed=PICTURES_SEED)
    pack(ArraySource(images, labels, class_names=CLASS_NAMES), url, workers=1)
