"""The data set that needs no download: pictures of shapes, drawn into the run folder and packed like any other."""

from __future__ import annotations

from dist_gan import storage
from dist_gan.config import RunConfig, ShapesData, ShardsData
from dist_gan.data.checks import check_data
from dist_gan.embedded.shapes import CLASS_NAMES, draw_shapes
from dist_gan.packing.pack import pack
from dist_gan.packing.sources import ArraySource
from dist_gan.types import UserError

PICTURES_SEED = 2026
"""The pictures are the same for every run; its seed decides their order and the rest."""


def data_sources(config: RunConfig) -> dict[str, int]:
    """Folders of the shards that a configuration trains on, with their weights."""
    if isinstance(config.data, ShardsData):
        return config.data.sources
    return {storage.join(config.run.dir, "data"): 1}


def prepare_data(config: RunConfig) -> list[str]:
    """Draws and packs the embedded data set, or checks that the shards are there and fit; one process does it.

    Returns:
        What the user should know, in sentences.

    Raises:
        UserError: there is no manifest, a shard is not as the manifest says, or the networks do not fit the images.
        TrainingFailed: the pictures cannot be written.
    """
    if isinstance(config.data, ShapesData):
        images, labels = draw_shapes(config.data.count, seed=PICTURES_SEED)
        (url,) = data_sources(config)
        pack(ArraySource(images, labels, class_names=CLASS_NAMES), url, workers=1)
        return []
    mistakes, notes = check_data(config)
    if mistakes:
        raise UserError(*mistakes)
    return notes
