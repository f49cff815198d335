"""Images become WebDataset shards with a manifest. A pack that is killed goes on when it is started again.

The way of a pack through its folder: `.pack-plan.json` says what is being made; every shard appears under its name
when it is whole, with a hidden index beside it; `manifest.json` comes last, and then plan and indexes go. Training
takes no folder without a manifest.
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
from dist_gan.data.listing import Entry
from dist_gan.data.manifest import Manifest, write_manifest
from dist_gan.data.pack_folder import (
    SKIPPED,
    Settled,
    alone_in,
    already_packed,
    begun,
    make_folder,
    remove_leftovers,
    write_plan,
)
from dist_gan.data.processes import Tell, Workers, num_cores
from dist_gan.data.shard_writer import (
    Bad,
    Finished,
    ShardJob,
    ShardSettings,
    chunks,
    index_name,
    raise_if_bad,
    read_finished,
    shard_name,
    write_shard,
)
from dist_gan.data.sources import Reader, Source
from dist_gan.data.survey import MAX_RESOLUTION, MIN_RESOLUTION, is_resolution, settle
from dist_gan.types import TrainingFailed, UserError

SAMPLES_PER_SHARD = 4096
_VERSION = 2
_FEW_IMAGES = 4000
"""So few are packed before a second process has started."""


def say_on_stderr(sentence: str) -> None:
    """One line for the person at the terminal."""
    print(sentence, file=sys.stderr)


def progress_bar(what: str, progress: bool | None, *, total: int | None) -> tqdm[NoReturn]:
    """A bar of images on the terminal; with None only where there is a terminal."""
    return tqdm(total=total, unit="image", desc=what, disable=None if progress is None else not progress)


def pack(
    source: Source,
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
    """Writes a source's images into shards and returns their manifest.

    The same images and options give the same bytes, whatever the number of workers, and starting again goes on
    where a killed pack stopped. Samples come in the order of a hash of their key, so shards are not sorted by class.
    An image that fits and is a plain 8-bit JPEG or PNG keeps its bytes; every other becomes a PNG.

    Args:
        source: images, from `open_source` or `ArraySource`.
        dest: folder of the shards, local; absent, empty, or begun by the same pack.
        resolution: side of the images in pixels, a power of two from 16 to 1024; None takes the images' own.
        channels: 1 or 3; None takes the images' own.
        samples_per_shard: images in each shard but the last.
        upscale: enlarges smaller images instead of refusing them.
        pad: puts smaller images on black instead of refusing them.
        labels: writes a `.cls` for each image where the source has labels.
        skip_bad: leaves out images that cannot be used and lists them in `skipped.txt`.
        workers: processes; None for one a core. With 1 no process is made.
        progress: a bar on the terminal; None shows one only where there is a terminal.
        say: takes sentences for the user.

    Raises:
        UserError: options, source or folder are wrong, or images are bad (up to ten are listed).
        TrainingFailed: the disk is full or the folder does not take the files; nothing half is left.
    """
    _check_options(resolution, channels, samples_per_shard, upscale, pad, workers)
    folder = _local_folder(dest, source)
    for note in source.notes:
        say(f"{source.place}: {note}")
    plan = _plan_of(source, resolution, channels, samples_per_shard, upscale, pad, labels)
    finished = already_packed(folder, plan, say)
    if finished is not None:
        return finished
    settled = begun(folder, plan)
    make_folder(folder)
    num_workers = workers or (1 if len(source.entries) < _FEW_IMAGES else num_cores())
    with alone_in(folder), Workers(source.reader, count=num_workers) as processes:
        if settled is None:
            with progress_bar("looking", progress, total=len(source.entries)) as bar:
                settled = Settled(
                    *settle(
                        source,
                        resolution=resolution,
                        channels=channels,
                        skip_bad=skip_bad,
                        workers=processes,
                        tell=bar.update,
                    )
                )
            write_plan(folder, plan, settled)
        settings = ShardSettings(
            folder=folder,
            plan=plan,
            resolution=settled.resolution,
            channels=settled.channels,
            upscale=upscale,
            pad=pad,
            labels=labels,
            skip_bad=skip_bad,
        )
        jobs = _jobs(source, samples_per_shard)
        missing = [job for job in jobs if _usable(settings, job.number) is None]
        if len(missing) < len(jobs):
            say(f"{folder}: going on: {len(jobs) - len(missing)} of {len(jobs)} shards are there already")
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


def _local_folder(dest: str, source: Source) -> Path:
    storage.check_url(dest, place="destination")
    folder = storage.local_path(dest)
    if folder is None:
        raise UserError(
            f"destination {storage.redact(dest)}: shards are packed onto a local disk only; pack into a folder and "
            f"copy that to the store"
        )
    inside = Path(source.place)
    if inside.is_dir() and folder.resolve().is_relative_to(inside.resolve()):
        raise UserError(f"destination {dest}: lies inside the source {source.place}; give a folder outside of it")
    return folder


def _plan_of(
    source: Source,
    resolution: int | None,
    channels: int | None,
    samples_per_shard: int,
    upscale: bool,
    pad: bool,
    labels: bool,
) -> str:
    """Hash of all that decides about the bytes of the shards. `skip_bad` does not: whole shards serve both."""
    options = [_VERSION, resolution, channels, samples_per_shard, upscale, pad, labels, source.classes]
    digest = hashlib.sha256(json.dumps([*options, source.identity]).encode("ascii"))
    for entry in source.entries:
        digest.update(json.dumps(entry).encode("ascii"))
    return digest.hexdigest()


def _origin(source: Source, plan: str) -> str:
    return f"dist-gan pack of {Path(source.place).name} (plan {plan})"


def _jobs(source: Source, samples_per_shard: int) -> list[ShardJob]:
    def scattered(entry: Entry) -> bytes:
        return hashlib.sha256(entry.key.encode()).digest()

    order = tuple(sorted(source.entries, key=scattered))
    return [ShardJob(number, part) for number, part in enumerate(chunks(order, samples_per_shard))]


def _usable(settings: ShardSettings, number: int) -> Finished | None:
    finished = read_finished(settings.folder, number, plan=settings.plan)
    return None if finished is None or (finished.skipped and not settings.skip_bad) else finished


def _write(
    settings: ShardSettings, missing: list[ShardJob], processes: Workers[Reader], *, tell: Tell, place: str
) -> None:
    bad: list[Bad] = []

    def until_bad() -> Iterator[ShardJob]:
        for job in missing:
            if bad:
                return
            yield job

    for found in processes.run(partial(write_shard, settings), until_bad(), tell=tell):
        bad.extend(found)
    raise_if_bad(bad, place=place)


def _finish(settings: ShardSettings, num_shards: int, source: Source, say: Callable[[str], None]) -> Manifest:
    finished = []
    for number in range(num_shards):
        shard = _usable(settings, number)
        if shard is None:
            raise TrainingFailed(
                f"{settings.folder / shard_name(number)} ({index_name(number)}) was changed while the pack was at "
                f"work; start the same command again"
            )
        finished.append(shard)
    skipped = sorted(image for shard in finished for image in shard.skipped)
    shards = tuple(shard.shard for shard in finished if shard.shard is not None)
    if not shards:
        raise_if_bad(skipped, place=source.place)
    folder = settings.folder
    manifest = Manifest(
        resolution=settings.resolution,
        channels=settings.channels,
        classes=source.classes if settings.labels else None,
        shards=shards,
        origin=_origin(source, settings.plan),
    )
    if skipped:
        lines = "".join(f"{image.member}\t{' '.join(image.reason.split())}\n" for image in skipped)
        storage.publish(str(folder / SKIPPED), lines.encode("utf-8"))
        say(f"{source.place}: left out {len(skipped):,} bad images; they are listed in {folder / SKIPPED}")
    write_manifest(str(folder), manifest)
    remove_leftovers(folder)
    return manifest
