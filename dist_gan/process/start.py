"""Checks before a run starts (processes, settings, networks, data), which report all mistakes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dist_gan import urls
from dist_gan.config import RunConfig
from dist_gan.config.reader import Reading, read_settings, to_yaml
from dist_gan.mistakes import TrainingFailed, UserError
from dist_gan.wording import shown

if TYPE_CHECKING:
    from dist_gan.own_parts import OwnParts

MAX_PROCESSES = 2**20
MAX_PARAMETERS = 10**10
"""Largest number of parameters of both networks together: 200 GB in fp32 with gradients, Adam's moments and average."""


class LaunchPlace(NamedTuple):
    """Rank of this process, and number of processes of its launch."""

    rank: int
    world_size: int


def place_in_launch(environment: Mapping[str, str]) -> LaunchPlace:
    """Reads rank and number of processes from the launcher's environment variables; returns rank 0 of 1 without a launcher.

    Raises:
        UserError: a variable is not a number, or contradicts another one.
    """
    world_size = _number(environment, "WORLD_SIZE", 1, low=1, below=MAX_PROCESSES + 1)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", world_size, low=1, below=world_size + 1)
    _number(environment, "LOCAL_RANK", 0, low=0, below=local_size)
    return LaunchPlace(_number(environment, "RANK", 0, low=0, below=world_size), world_size)


def _number(environment: Mapping[str, str], name: str, default: int, *, low: int, below: int) -> int:
    text = environment.get(name, str(default))
    if text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) < below:
        return int(text)
    raise UserError(
        f"{name}: {shown(text)} in the environment is no whole number from {low} to {below - 1}; start with `accelerate "
        f"launch`, which sets it, or unset WORLD_SIZE, LOCAL_WORLD_SIZE, RANK and LOCAL_RANK"
    )


def settings(
    path: str | Path | None,
    overrides: Sequence[str],
    *,
    place: LaunchPlace,
    is_rehearsal: bool = False,
    own: OwnParts | None = None,
) -> RunConfig:
    """Reads the settings of a run, and makes all checks that are possible before the run begins; returns the settings.

    Args:
        path: YAML file, or None for the defaults.
        overrides: assignments such as `run.batch=64`.
        place: rank of this process and number of processes.
        is_rehearsal: True to check the data in any case. A real start checks the data after it has locked the run's
            folder; but if the settings are wrong, the data are checked here, so that all mistakes are reported together.
        own: parts of the user's own script; None without any.

    Raises:
        UserError: one report of all mistakes.
    """
    reading = read_settings(path, overrides, world_size=place.world_size)
    more = [] if reading.is_wrong("networks") else _network_mistakes(reading.config, own)
    if is_rehearsal or (reading.mistakes and place.rank == 0 and _is_near(reading.config, place)):
        more += _data_mistakes(reading)
    mistakes = reading.report(more)
    if mistakes is not None:
        raise mistakes
    return reading.config


def _is_near(config: RunConfig, place: LaunchPlace) -> bool:
    """Returns True if a check of the data makes no other rank wait for a store: one process, local shards, or none."""
    return place.world_size == 1 or all(urls.local_path(url) is not None for url in config.data.sources)


def _data_mistakes(reading: Reading) -> list[str]:
    from dist_gan.data.checks import check_data
    from dist_gan.models import FAMILIES

    if FAMILIES[reading.config.networks.kind].makes == "points":
        return []  # points are not read from files; the settings' rules report shards for such networks
    try:
        mistakes, _ = check_data(reading.config)
    except TrainingFailed as error:
        mistakes = [f"data: {error}"]
    # A setting with a reported mistake holds a default, whose data the user did not choose; it is not reported again.
    told = {text.partition(":")[0] for text in reading.mistakes}
    placed = [(text.partition(":")[0], text) for text in mistakes]
    return [text for place, text in placed if place not in told and not reading.is_wrong(place)]


def _network_mistakes(config: RunConfig, own: OwnParts | None) -> list[str]:
    from dist_gan.own_parts import NO_PARTS

    if mistakes := (own or NO_PARTS).mistakes(config.networks.kind):
        return mistakes
    found = _sizes(config, own)
    total = sum(found or (0,))
    if total <= MAX_PARAMETERS:
        return []
    return [
        f"networks: {total:,} parameters, {total * 20 / 2**30:,.0f} GiB in fp32 with gradients, Adam's moments and the "
        f"average, are more than the {MAX_PARAMETERS:,} that are possible; choose smaller widths, depths or latents"
    ]


def _sizes(config: RunConfig, own: OwnParts | None) -> tuple[int, int] | None:
    """Returns the numbers of parameters of generator and discriminator; None if they cannot be built without memory."""
    from dist_gan.models import sizes

    if own is None or own.networks is None:
        return sizes(config.networks)
    try:
        return sizes(config.networks, own=own.networks)
    except UserError:
        raise
    except Exception:  # the user's function may do what tensors without memory cannot; the start itself says what fails
        return None


def describe(config: RunConfig, *, world_size: int, own: OwnParts | None = None) -> str:
    """Returns the text of `--dry-run`: resolved settings, sizes of the networks, and each process's share of the batch."""
    from dist_gan.objectives.losses import LOSSES

    found = _sizes(config, own)
    generator, discriminator = (f"{n:,}" for n in found) if found else ("unknown", "unknown")
    share = config.run.batch // world_size
    micro = config.runtime.micro_batch or share
    steps = -(-config.run.images // (config.run.batch * config.run.d_updates))
    return "\n".join(
        [
            to_yaml(config),
            f"# generator      {generator} parameters",
            f"# discriminator  {discriminator} parameters",
            f"# loss           {LOSSES[config.objective.kind].description}",
            f"# batch          {config.run.batch} images = {world_size} processes x {share // micro} micro-batches x {micro}",
            f"# steps          {steps:,}, each {config.run.d_updates} discriminator updates and 1 generator update",
        ]
    )
