"""Checks, before a run starts, that its shards are complete and fit the settings of the networks."""

from __future__ import annotations

from dist_gan import storage
from dist_gan.config import RunConfig, ShardsData
from dist_gan.data.manifest import Manifest, check_shards, read_manifest
from dist_gan.models import picture_networks
from dist_gan.types import UserError


def check_data(config: RunConfig) -> tuple[list[str], list[str]]:
    """Returns the mistakes found in the shards of a run, and notes about tolerated damage.

    Every folder is checked, so that one report has all mistakes: a missing manifest, shards that differ from their
    manifest, networks of another resolution or number of channels or classes. Data that the program makes itself are not
    checked.

    Raises:
        TrainingFailed: the store does not answer, so that its shards cannot be checked.
    """
    mistakes: list[str] = []
    notes: list[str] = []
    if not isinstance(config.data, ShardsData):
        return mistakes, notes
    try:
        networks = picture_networks(config.networks)
    except UserError as error:
        return [str(error)], notes
    substitute = config.data.bad_images == "substitute"
    for url in config.data.sources:
        place = "data.url" if url == config.data.url else "data.mix"
        try:
            manifest = read_manifest(url)
        except UserError as error:
            mistakes += _at(place, error)
            continue
        try:
            check_fit(
                url, manifest, resolution=networks.resolution, channels=networks.channels, classes=networks.classes
            )
        except UserError as error:
            mistakes += error.args
        may_lose = int(config.data.max_bad * manifest.num_samples) if substitute else None
        try:
            notes += check_shards(url, manifest, may_lose=may_lose)
        except UserError as error:
            mistakes += _at(place, error)
    return mistakes, notes


def _at(place: str, error: UserError) -> list[str]:
    first, *rest = error.args
    return [f"{place}: {first}", *(f"  {line}" for line in rest)]


def check_fit(url: str, manifest: Manifest, *, resolution: int, channels: int, classes: int) -> None:
    """Compares the settings of the networks with the images in a folder of shards.

    Raises:
        UserError: the networks cannot be trained on these images; one sentence per reason.
    """
    place, mistakes = storage.redact(url), []
    if manifest.resolution is not None and manifest.resolution < resolution:
        mistakes.append(
            f"networks.resolution: {resolution}, but the shards at {place} hold images of {manifest.resolution} pixels; "
            f"set networks.resolution={manifest.resolution}, or pack the originals with --resolution {resolution}"
        )
    if manifest.channels != channels:
        mistakes.append(
            f"networks.channels: {channels}, but the shards at {place} hold images of {manifest.channels}; "
            f"set networks.channels={manifest.channels}, or pack with --channels {channels}"
        )
    found = len(manifest.classes) if manifest.classes is not None else 0
    if classes and classes != found:
        mistakes.append(
            f"networks.classes: {classes}, but the shards at {place} have {found or 'no'} classes; "
            f"set networks.classes={found}"
        )
    if mistakes:
        raise UserError(*mistakes)
