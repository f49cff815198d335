"""Data of a run: the folders of its shards, and the preparation and checks before they are read."""

from __future__ import annotations

from dist_gan import storage
from dist_gan.config import RunConfig
from dist_gan.data.checks import check_data
from dist_gan.embedded.writer import write_shapes
from dist_gan.types import UserError


def data_sources(config: RunConfig) -> dict[str, int]:
    """Returns the URLs of the folders of shards that a configuration trains on, with their mixing weights."""
    return config.data.sources or {storage.join(config.run.dir, "data"): 1}


def sees_data(config: RunConfig) -> bool:
    """True if this process sees the embedded data set that rank 0 has written, or if the shards are the user's."""
    return not config.data.num_drawn or all(
        storage.exists(storage.join(url, "manifest.json")) for url in data_sources(config)
    )


def prepare_data(config: RunConfig) -> list[str]:
    """Writes the embedded data set, or checks that the shards of the user are there and fit. Called on one rank.

    Returns:
        Sentences for the user about the data.

    Raises:
        UserError: there is no manifest, a shard is not as the manifest says, or the networks do not fit the images.
        TrainingFailed: the embedded data set cannot be written, or a store does not answer.
    """
    if config.data.num_drawn:
        (url,) = data_sources(config)
        write_shapes(url, count=config.data.num_drawn)
        return []
    mistakes, notes = check_data(config)
    if mistakes:
        raise UserError(*mistakes)
    return notes
