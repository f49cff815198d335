"""Packs images into WebDataset shards with a manifest. A pack that was killed continues when it is started again.

Files in the destination, in the order in which a pack writes them: `.pack-plan.json` with the hash of source and
options; each shard, once it is complete, with a hidden index file beside it; `manifest.json` at the end. Then the plan
and the index files are deleted. Training refuses a folder without a manifest.

Memory: a worker holds one decoded image, and with a store at most `fetching.MAX_PENDING_BYTES` of downloaded files. It
writes its shard to a file on a local disk. The main process holds the list of images, of a few hundred bytes for each
image, and about a kilobyte for each while it lists a store.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from dist_gan import storage
from dist_gan.data.manifest import Manifest, write_manifest
from dist_gan.packing.destinations import open_destination
from dist_gan.packing.image_source import ImageReader, ImageSource
from dist_gan.packing.listing import Entry
from dist_gan.packing.pack_folder import (
    SKIPPED,
    find_finished_pack,
    is_stray,
    read_plan,
    remove_leftovers,
    write_plan,
)
from dist_gan.packing.processes import Tell, Workers, num_cores
from dist_gan.packing.shard_writer import (
    ImageProblem,
    ShardJob,
    ShardResult,
    ShardSettings,
    chunks,
    index_name,
    raise_if_problems,
    read_finished_shards,
    shard_name,
    write_shard,
)
from dist_gan.packing.survey import MAX_RESOLUTION, MIN_RESOLUTION, choose_shape, is_resolution
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import safe

SAMPLES_PER_SHARD = 4096
_VERSION = 2
_FEW_IMAGES = 4000
"""Number of images below which one process is faster, because starting a second one takes longer than packing."""


def say_on_stderr(sentence: str) -> None:
    """Prints a message for the user on standard error."""
    print(safe(sentence), file=sys.stderr)


def progress_bar(what: str, progress: bool | None, *, total: int | None) -> tqdm[NoReturn]:
    """A progress bar that counts images; with `progress=None` it is shown only on a terminal."""
    return tqdm(total=total, unit="image", desc=what, disable=None if progress is None else not progress)


def pack(
    source: ImageSource,
    dest: str,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    upscale: bool = False,
    pad: bool = False,
    labels: bool = True,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> Manifest:
    """Packs the images of a source into shards, and returns their manifest.

    The same images and options give the same bytes for any number of workers, and a second start continues an
    interrupted pack. Samples are ordered by a hash of their key, so that shards are not sorted by class. A plain 8-bit
    JPEG or PNG of the right size and channels is copied unchanged; any other image is converted to a PNG.

    Args:
        source: images, from `open_source` or `ArraySource`.
        dest: folder of the shards, a path or a URL; it may be absent, empty, or left by an interrupted pack of the same
            images and options.
        resolution: side of the images in pixels, a power of two from 16 to 1024; None takes the size that all
            images have.
        channels: 1 or 3; None takes the number of channels that all images have.
        samples_per_shard: number of images in each shard but the last.
        upscale: enlarges images smaller than `resolution` instead of refusing them.
        pad: adds a black border to smaller images instead of refusing them.
        labels: writes a `.cls` member for each image if the source has labels.
        skip_bad: leaves out images that cannot be used and lists them in `skipped.txt`.
        workers: number of processes; None for one per core. With 1 the calling process does all work.
        progress: shows a progress bar; None shows one only on a terminal.
        say: called with messages for the user.

    Raises:
        UserError: an option, the source or the destination is wrong, or images are unusable (up to ten are listed).
        TrainingFailed: the disk is full, a file cannot be written, or a store does not answer; no incomplete shard is
            left.
    """
    _check_options(resolution, channels, samples_per_shard, upscale, pad, workers)
    folder = open_destination(dest, source)
    plan = _plan_of(source, resolution, channels, samples_per_shard, upscale, pad, labels)
    names = folder.names()
    finished = find_finished_pack(folder, names, plan, say)
    if finished is not None:
        _say_notes(source, say)
        return finished
    shape = read_plan(folder, names, plan)
    folder.create()
    num_workers = workers or (1 if len(source.entries) < _FEW_IMAGES else num_cores())
    if "memory" in (storage.scheme_of(source.place), storage.scheme_of(folder.url)):
        num_workers = 1  # `memory://` of fsspec lives in one process
    with folder.claim(is_stray), Workers(source.reader, count=num_workers) as processes:
        if shape is None:
            with progress_bar("looking", progress, total=len(source.entries)) as bar:
                shape = choose_shape(
                    source,
                    resolution=resolution,
                    channels=channels,
                    skip_bad=skip_bad,
                    workers=processes,
                    tell=bar.update,
                )
            write_plan(folder, plan, shape)
        settings = ShardSettings(
            folder=folder,
            plan=plan,
            resolution=shape.resolution,
            channels=shape.channels,
            upscale=upscale,
            pad=pad,
            labels=labels,
            skip_bad=skip_bad,
        )
        jobs = _jobs(source, samples_per_shard)
        there = {number for number, _ in _usable(settings, len(jobs))}
        missing = [job for job in jobs if job.number not in there]
        if there:
            say(f"{folder.url}: going on: {len(jobs) - len(missing)} of {len(jobs)} shards are there already")
        with progress_bar("packing", progress, total=len(source.entries)) as bar:
            bar.update(len(source.entries) - sum(len(job.entries) for job in missing))
            _write(settings, missing, processes, tell=bar.update, place=source.place)
        return _finish(settings, len(jobs), source, say)


def _check_options(
    resolution: int | None, channels: int | None, samples_per_shard: int, upscale: bool, pad: bool, workers: int | None
) -> None:
    if resolution is not None and not is_resolution(resolution):
        raise UserError(
            f"resolution: {resolution} is not a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}, which the "
            f"networks need; give 32, 64, 128 or the like"
        )
    if channels not in (None, 1, 3):
        raise UserError(f"channels: {channels} is neither 1 (grey) nor 3 (RGB)")
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard: {samples_per_shard} is not positive; {SAMPLES_PER_SHARD} is usual")
    if workers is not None and workers < 1:
        raise UserError(f"workers: {workers} is not positive; leave it out for one a core")
    if upscale and pad:
        raise UserError("upscale and pad exclude each other: give --pad for a black border or --upscale to enlarge")


def _plan_of(
    source: ImageSource,
    resolution: int | None,
    channels: int | None,
    samples_per_shard: int,
    upscale: bool,
    pad: bool,
    labels: bool,
) -> str:
    """Hash of everything that determines the bytes of the shards. `skip_bad` is left out, since it changes only shards with
    unusable images, which `_usable` tells apart."""
    options = [_VERSION, resolution, channels, samples_per_shard, upscale, pad, labels, source.classes]
    digest = hashlib.sha256(json.dumps([*options, source.identity]).encode("ascii"))
    for entry in source.entries:
        digest.update(json.dumps(entry).encode("ascii"))
    return digest.hexdigest()


def _origin(source: ImageSource, plan: str) -> str:
    return f"dist-gan pack of {Path(source.place).name} (plan {plan})"


def _jobs(source: ImageSource, samples_per_shard: int) -> list[ShardJob]:
    def scattered(entry: Entry) -> bytes:
        return hashlib.sha256(entry.key.encode()).digest()

    order = tuple(sorted(source.entries, key=scattered))
    return [ShardJob(number, part) for number, part in enumerate(chunks(order, samples_per_shard))]


def _usable(settings: ShardSettings, num_shards: int) -> Iterator[tuple[int, ShardResult]]:
    for number, result in read_finished_shards(settings.folder, range(num_shards), plan=settings.plan):
        if settings.skip_bad or not result.skipped:
            yield number, result


def _write(
    settings: ShardSettings, missing: list[ShardJob], processes: Workers[ImageReader], *, tell: Tell, place: str
) -> None:
    problems: list[ImageProblem] = []
    started: list[ShardJob] = []

    def jobs_until_problem() -> Iterator[ShardJob]:
        for job in missing:
            if problems:
                return
            settings.folder.check_claim()
            started.append(job)
            yield job

    for found in processes.run(partial(write_shard, settings), jobs_until_problem(), tell=tell):
        problems.extend(found)
    seen = None if len(started) == len(missing) else sum(len(job.entries) for job in started)
    raise_if_problems(problems, place=place, seen=seen)


def _say_notes(source: ImageSource, say: Callable[[str], None]) -> None:
    for note in source.notes:
        say(f"{source.place}: {note}")


def _finish(settings: ShardSettings, num_shards: int, source: ImageSource, say: Callable[[str], None]) -> Manifest:
    settings.folder.check_claim()
    by_number = dict(_usable(settings, num_shards))
    for number in range(num_shards):
        if number not in by_number:
            raise TrainingFailed(
                f"{storage.join(settings.folder.url, shard_name(number))} ({index_name(number)}) was changed while the "
                f"pack was at work; start the same command again"
            )
    finished = [by_number[number] for number in range(num_shards)]
    skipped = sorted(image for shard in finished for image in shard.skipped)
    shards = tuple(shard.shard for shard in finished if shard.shard is not None)
    if not shards:
        raise_if_problems(skipped, place=source.place)
    folder = settings.folder
    manifest = Manifest(
        resolution=settings.resolution,
        channels=settings.channels,
        classes=source.classes if settings.labels else None,
        shards=shards,
        origin=_origin(source, settings.plan),
    )
    _say_notes(source, say)
    if skipped:
        lines = "".join(f"{safe(image.member)}\t{safe(' '.join(image.reason.split()))}\n" for image in skipped)
        storage.publish(storage.join(folder.url, SKIPPED), lines.encode("utf-8"))
        listed = storage.join(folder.url, SKIPPED)
        say(f"{source.place}: left out {len(skipped):,} bad images; they are listed in {listed}")
    write_manifest(folder.url, manifest)
    remove_leftovers(folder, folder.names())
    return manifest
