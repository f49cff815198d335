"""Rules about settings of several sections that have to fit one another; each rule is one function.

A rule takes the settings and the number of processes of the launch. It returns the mistakes: None, one mistake, or one
mistake for each setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from dist_gan import urls
from dist_gan.config.data_sets import DataOrder, ShardsData
from dist_gan.config.sections import RunConfig
from dist_gan.config.values import Ramp, same_folder
from dist_gan.mistakes import UserError
from dist_gan.models import FAMILIES, families_for
from dist_gan.models.family import PictureNetworks
from dist_gan.objectives.losses import LOSSES
from dist_gan.objectives.penalties import PENALTIES
from dist_gan.types import Knobs
from dist_gan.wording import redact, scheme_of, shown


class Mistake(NamedTuple):
    """Mistake in settings that do not fit one another."""

    places: tuple[str, ...]
    """Dotted names of the settings involved; the mistake is not reported if one of them is invalid by itself."""
    text: str
    """Sentence that begins with the name of the setting to change, and has its value and the remedy."""


Rule = Callable[[RunConfig, int], Mistake | Iterable[Mistake] | None]


def batch_divides_over_processes(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that the batch divides evenly over the processes."""
    batch = config.run.batch
    if batch % world_size == 0:
        return None
    nearest = max(world_size, round(batch / world_size) * world_size)
    return Mistake(
        ("run.batch",),
        f"run.batch: {batch} images do not divide over {world_size} processes; take {nearest}, or start another number of "
        f"processes",
    )


def share_divides_into_micro_batches(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that each process's share of the batch is a whole number of micro-batches."""
    share, micro = config.run.batch // world_size, config.runtime.micro_batch
    if config.run.batch % world_size or micro is None or share % micro == 0:
        return None
    return Mistake(
        ("run.batch", "runtime.micro_batch"),
        f"runtime.micro_batch: {share} images a process do not divide into pieces of {micro}; choose a divisor of {share}",
    )


def networks_make_what_the_data_are(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires networks for points with points, and networks for images with images."""
    kind = config.networks.kind
    if FAMILIES[kind].makes == config.data.makes:
        return None
    return Mistake(
        ("data", "networks.kind"),
        f"networks.kind: {kind!r} does not fit data.kind {config.data.kind!r}; points go with {families_for('points')}, "
        f"images with {families_for('images')}",
    )


def networks_have_the_size_of_the_shapes(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that the networks have the size and channels of the images that the program draws."""
    networks = config.networks
    if not config.data.num_drawn or not isinstance(networks, PictureNetworks):
        return None
    if (networks.resolution, networks.channels) == (32, 3):
        return None
    return Mistake(
        ("data", "networks.resolution", "networks.channels"),
        f"networks.resolution: {networks.resolution} with {networks.channels} channels, but the embedded shapes are 32x32 in "
        f"colour; set networks.resolution=32 networks.channels=3",
    )


def networks_have_the_classes_of_the_data(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that the networks have no classes, or as many as the data that the program makes."""
    data, classes = config.data, config.networks.classes
    if (
        data.num_classes is None
        or classes in (0, data.num_classes)
        or data.makes != FAMILIES[config.networks.kind].makes
    ):
        return None
    noun, number = ("points", "that") if data.makes == "points" else ("embedded shapes", str(data.num_classes))
    return Mistake(
        ("data", "networks.classes"),
        f"networks.classes: {classes}, but the {noun} have {data.num_classes} classes; take {number}, or 0 for none",
    )


def every_process_has_a_lane(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires at least one lane (parallel part of the order of images) for each process to read."""
    if not isinstance(config.data, DataOrder) or config.data.lanes >= world_size:
        return None
    return Mistake(
        ("data.lanes",),
        f"data.lanes: {config.data.lanes} lanes cannot be dealt to {world_size} processes; take a multiple of {world_size}",
    )


def folders_of_shards_can_be_read(config: RunConfig, world_size: int) -> list[Mistake]:
    """Requires that each folder of shards is at a URL that is allowed."""
    urls_of = [("data.url" if index == 0 else "data.mix", url) for index, url in enumerate(config.data.sources)]
    return [Mistake((place,), text) for place, url in urls_of if (text := _refusal(url, place=place)) is not None]


def the_mixture_has_each_folder_once(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that the folder `data.url` is not in `data.mix` as well."""
    data = config.data
    if not isinstance(data, ShardsData) or same_folder(data.url) not in map(same_folder, data.mix):
        return None
    return Mistake(("data.mix",), f"data.mix: {redact(data.url)!r} is data.url too; give it data.weight")


def patience_ends_before_a_rank_is_missed(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that a rank stops waiting for a store before the other ranks take it for dead."""
    data, limit = config.data, config.runtime.step_timeout_s
    if not isinstance(data, ShardsData) or data.patience_s < limit:
        return None
    if all(urls.local_path(url) is not None for url in data.sources):
        return None
    return Mistake(
        ("data.patience_s", "runtime.step_timeout_s"),
        f"data.patience_s: {data.patience_s} s, but a rank that does nothing for runtime.step_timeout_s={limit} is taken for "
        f"dead; be less patient with stores, or more with ranks",
    )


def the_disk_cache_is_on_a_disk(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that the disk cache is a local folder, whose name holds no secret."""
    if not isinstance(config.data, ShardsData) or not config.data.disk_cache:
        return None
    folder = config.data.disk_cache
    if scheme_of(folder) != "file":
        text = f"data.disk_cache: {redact(folder)!r} is no local folder; give a path on a disk"
    elif redact(folder) != folder:
        text = f"data.disk_cache: {redact(folder)!r} {urls.HAS_SECRET}"
    else:
        return None
    return Mistake(("data.disk_cache",), text)


def the_run_is_in_a_local_folder(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires a local run folder, because logs are appended to, which object stores do not offer."""
    folder = config.run.dir
    if folder and scheme_of(folder) == "file":
        return None
    return Mistake(
        ("run.dir",),
        f"run.dir: {redact(folder)!r} is no local folder; logs are appended to, so give a path on a disk",
    )


def what_the_run_starts_from_can_be_read(config: RunConfig, world_size: int) -> list[Mistake]:
    """Requires that the run's folder, and the checkpoints that it starts from, are at URLs that are allowed."""
    run = config.run
    starts = {
        "run.dir": run.dir if scheme_of(run.dir) == "file" else None,
        "run.resume": None if run.resume in ("auto", "never") else run.resume,
        "run.init_from": run.init_from,
        "checkpoint.url": config.checkpoint.url,
    }
    return [
        Mistake((place,), text)
        for place, url in starts.items()
        if url is not None and (text := _refusal(url, place=place)) is not None
    ]


def checkpoints_go_where_files_can_be_written(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that checkpoints are not written to an HTTP server, which takes no files."""
    url = config.checkpoint.url
    if url is None or scheme_of(url) not in ("http", "https"):
        return None
    return Mistake(
        ("checkpoint.url",),
        f"checkpoint.url: {redact(url)!r}: an HTTP server takes no files; give a bucket (s3://bucket/run) or a local folder",
    )


def the_best_checkpoint_is_that_of_a_logged_scalar(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires that `checkpoint.keep_best` names a scalar that is known when a checkpoint is written."""
    wanted, names = config.checkpoint.keep_best, logged_scalars(config)
    if wanted is None or wanted.removeprefix("-") in names:
        return None
    return Mistake(
        ("checkpoint.keep_best", "objective"),
        f"checkpoint.keep_best: {shown(wanted)} names no scalar that this run logs before a checkpoint; choose one of "
        f"{', '.join(names)} (a - before it keeps the highest)",
    )


def penalties_are_of_each_image(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires, for gradient penalties, a discriminator whose logit of an image depends on that image alone."""
    dependence = FAMILIES[config.networks.kind].batch_dependence(config.networks)
    if dependence is None or not _is_penalised(config):
        return None
    place = f"networks.{dependence.setting}"
    return Mistake(
        ("objective", place),
        f"{place}: {getattr(config.networks, dependence.setting)!r} mixes the images of a batch, so the gradient penalties of "
        f"the objective would not be of each image; set {place}={dependence.instead}, or the penalties to 0",
    )


def smoothed_labels_need_targets(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires, for label smoothing, a loss with targets; other losses have no labels to smooth."""
    objective = config.objective
    if not objective.label_smoothing or LOSSES[objective.kind].has_targets:
        return None
    with_targets = " or ".join(kind for kind, loss in LOSSES.items() if loss.has_targets)
    return Mistake(
        ("objective.label_smoothing", "objective.kind"),
        f"objective.label_smoothing: {objective.label_smoothing} has no effect with {objective.kind!r}, which has no labels; "
        f"set it to 0, or take {with_targets}",
    )


def lazy_penalties_need_a_penalty(config: RunConfig, world_size: int) -> Mistake | None:
    """Requires a gradient penalty if an interval between penalties is set."""
    every = config.objective.penalty_every
    if every == 1 or _is_penalised(config):
        return None
    *others, last = PENALTIES
    return Mistake(
        ("objective",),
        f"objective.penalty_every: {every} has no effect without a penalty; set {', '.join(others)} or {last}",
    )


RULES: tuple[Rule, ...] = (
    batch_divides_over_processes,
    share_divides_into_micro_batches,
    networks_make_what_the_data_are,
    networks_have_the_size_of_the_shapes,
    networks_have_the_classes_of_the_data,
    every_process_has_a_lane,
    folders_of_shards_can_be_read,
    the_mixture_has_each_folder_once,
    patience_ends_before_a_rank_is_missed,
    the_disk_cache_is_on_a_disk,
    the_run_is_in_a_local_folder,
    what_the_run_starts_from_can_be_read,
    checkpoints_go_where_files_can_be_written,
    the_best_checkpoint_is_that_of_a_logged_scalar,
    penalties_are_of_each_image,
    smoothed_labels_need_targets,
    lazy_penalties_need_a_penalty,
)
"""All rules, in the order in which their mistakes are reported."""


def cross_field_mistakes(config: RunConfig, world_size: int) -> list[Mistake]:
    """Applies all rules, and returns the mistakes found."""
    found: list[Mistake] = []
    for rule in RULES:
        answer = rule(config, world_size)
        found += [answer] if isinstance(answer, Mistake) else answer or []
    return found


def logged_scalars(config: RunConfig) -> tuple[str, ...]:
    """Returns the names of the scalars that `checkpoint.keep_best` may name: those reduced over ranks and logged with a
    checkpoint.

    No checkpoint has timings (`time/...`), which one rank measures, or the modes of the embedded data set
    (`metric/...`), which are counted after the run has ended.
    """
    objective = config.objective
    weights = {scalar: getattr(objective, setting) for setting, scalar in PENALTIES.items()}
    weights["penalty/lecam"] = objective.lecam
    return (
        "loss/discriminator",
        "loss/generator",
        "logits/real",
        "logits/fake",
        "logits/real_positive",
        "logits/generated",
        *(name for name, weight in weights.items() if _is_ever_positive(weight)),
        "gradient_norm/discriminator",
        "gradient_norm/generator",
        "skipped/discriminator",
        "skipped/generator",
        "recovery/rollbacks",
        "data/damaged",
        *(f"knobs/{name}" for name in Knobs._fields),
    )


def _refusal(url: str, *, place: str) -> str | None:
    """Returns the sentence that says why a URL is not allowed; None if the URL is allowed."""
    try:
        urls.check_url(url, place=place)
    except UserError as error:
        return str(error)
    return None


def _is_penalised(config: RunConfig) -> bool:
    """Returns whether any gradient penalty has a weight other than 0."""
    return any(getattr(config.objective, setting) != 0.0 for setting in PENALTIES)


def _is_ever_positive(knob: float | Ramp) -> bool:
    return knob.start > 0 or knob.end > 0 if isinstance(knob, Ramp) else knob > 0
