"""The data of a run: the folders of its shards, and what has to be done before they can be read."""

from __future__ import annotations

from dist_gan import storage
from dist_gan.config import RunConfig, ShapesData, ShardsData
from dist_gan.data.checks import check_data
from dist_gan.embedded.writer import write_shapes
from dist_gan.types import UserError


def data_sources(config: RunConfig) -> dict[str, int]:
    """URLs of the folders of shards that a configuration trains on, with their mixing weights."""
    if isinstance(config.data, ShardsData):
        return config.data.sources
    return {storage.join(config.run.dir, "data"): 1}


def prepare_data(config: RunConfig) -> list[str]:
    """Writes the embedded data set, or checks that the shards of the user are there and fit. Called on one rank.

    Returns:
        Sentences for the user about the data.

    Raises:
        UserError: there is no manifest, a shard is not as the manifest says, or the networks do not fit the images.
        TrainingFailed: the embedded data set cannot be written, or a store does not answer.
    """
    if isinstance(config.data, ShapesData):
        (url,) = data_sources(config)
        write_shapes(url, count=config.data.count)
        return []
    mistakes, notes = check_data(config)
    if mistakes:
        raise UserError(*mistakes)
    return notes
