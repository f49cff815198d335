"""Writes manifests for existing shards, and verifies shards against their manifest."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from dist_gan import storage
from dist_gan.data import manifest as manifests
from dist_gan.data.manifest import Manifest, Shard, read_manifest, write_manifest
from dist_gan.packing.labels import BadLabel, Label, classes_of, from_json
from dist_gan.packing.listing import MAX_SHOWN
from dist_gan.packing.pack import progress_bar, say_on_stderr
from dist_gan.packing.pack_folder import PLAN
from dist_gan.packing.processes import Tell, Workers, num_cores
from dist_gan.packing.shard_reader import IMAGE_EXTENSIONS, ShardScan, read_shard, split_by_webdataset
from dist_gan.packing.tar_scan import DamagedTar
from dist_gan.pictures import BadImage, decode, header
from dist_gan.types import UserError


class _ShardIndex(NamedTuple):
    """Result of indexing one shard."""

    shard: Shard | None
    """The shard without labels: class numbers are known only after all shards have been read. None if unusable."""
    labels: tuple[Label, ...]
    """Label of each image; empty if the shard has no labels."""
    sizes: Counter[tuple[int, int]]
    channels: Counter[int]
    passed_over: Counter[str]
    dotted: tuple[str, ...]
    problems: tuple[str, ...]


class _VerifyJob(NamedTuple):
    """Manifest entries with which one shard is compared by a worker."""

    shard: Shard
    resolution: int | None
    channels: int
    labels_in_cls: bool


_FROM_JSON = "dist-gan index with labels from "
"""Beginning of `origin` in the manifest if the labels do not come from `.cls` members."""


def index(
    url: str,
    *,
    label_key: str | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> Manifest:
    """Writes a manifest for the `*.tar` files in a folder, without changing them, and returns it.

    Every sample is a member `<key>.<jpg|jpeg|png|webp|bmp>` with a label in `<key>.cls` (a number), or in
    `<key>.json` under `label_key` (a number, or a name: sorted names become classes 0, 1, ...); all samples have a label
    or none. Other members are skipped and counted.

    Args:
        url: folder of the shards, a path or a URL.
        label_key: key of the label in each sample's `.json`; None takes `.cls`.
        force: replace an existing manifest.
        workers: number of processes; None for one per core.
        progress: shows a progress bar; None shows one only on a terminal.
        say: called with messages for the user.

    Raises:
        UserError: no shards, damaged shards, bad images or labels (one report of all, which shows the first ten).
        TrainingFailed: the manifest cannot be written.
    """
    shown = storage.redact(url)
    names = _list(url)
    if PLAN in names:
        raise UserError(f"{shown}: holds an unfinished pack; start the same `dist-gan pack` again to finish it")
    if manifests.NAME in names and not force:
        raise UserError(f"{shown}: has a {manifests.NAME} already; give --force to replace it")
    tars = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if not tars:
        packed = [name for name in names if name.endswith((".tar.gz", ".tgz", ".tar.zst"))]
        hint = f"; {packed[0]!r} is compressed, unpack such shards first" if packed else ""
        raise UserError(
            f"{shown}: no .tar files there{hint}; give the folder of the shards, or pack images with `dist-gan pack`"
        )
    found: dict[str, _ShardIndex] = {}
    with (
        Workers(url, count=min(workers or num_cores(), len(tars))) as processes,
        progress_bar("indexing", progress, total=None) as bar,
    ):
        for name, indexed in processes.run(partial(_index_shard, label_key), tars, tell=bar.update):
            found[name] = indexed
    manifest = _join([found[name] for name in tars], shown, label_key)
    passed_over: Counter[str] = sum((indexed.passed_over for indexed in found.values()), Counter())
    dotted = [name for indexed in found.values() for name in indexed.dotted]
    if passed_over:
        kinds = ", ".join(
            f"{n:,} {f'.{kind}' if kind else 'without an ending'}" for kind, n in passed_over.most_common(20)
        )
        say(f"{shown}: passed over {passed_over.total():,} members that belong to no image: {kinds}")
    if dotted:
        say(f"{shown}: {len(dotted):,} of them look like images; {split_by_webdataset(dotted[0])}")
    if len({extent for indexed in found.values() for extent in indexed.channels}) > 1:
        say(f"{shown}: holds grey and RGB images; grey ones will be read as RGB")
    write_manifest(url, manifest)
    return manifest


def verify(url: str, *, decode: bool = True, workers: int | None = None, progress: bool | None = None) -> list[str]:
    """Compares shards with their manifest, and returns a sentence for each difference; nothing is changed.

    It compares the list of files, the size and SHA-256 of each file, key, offset, size and extension of each image, and
    each `.cls` label; it checks the structure of each tar, and that each image decodes to the stated size.

    Args:
        url: folder of the shards, a path or a URL.
        decode: decode all images, which takes most of the time.
        workers: number of processes; None for one per core.
        progress: shows a progress bar; None shows one only on a terminal.

    Raises:
        UserError: there is no manifest, or it cannot be read.
    """
    manifest = read_manifest(url)
    in_cls = not manifest.origin.startswith(_FROM_JSON)
    jobs = [_VerifyJob(shard, manifest.resolution, manifest.channels, in_cls) for shard in manifest.shards]
    found: dict[str, list[str]] = {}
    with (
        Workers(url, count=min(workers or num_cores(), len(jobs))) as processes,
        progress_bar("verifying", progress, total=manifest.num_samples) as bar,
    ):
        for name, problems in processes.run(partial(_verify_shard, decode), jobs, tell=bar.update):
            found[name] = problems
    known = {shard.name for shard in manifest.shards}
    unknown = [name for name in _list(url) if name.endswith(".tar") and name not in known]
    extra = [f"{storage.redact(storage.join(url, name))}: is not in the manifest" for name in unknown]
    return [problem for shard in manifest.shards for problem in found[shard.name]] + extra


def _list(url: str) -> list[str]:
    try:
        return storage.list_names(url)
    except OSError as error:
        raise UserError(f"{storage.redact(url)}: cannot be listed: {storage.why(error, reading=True)}") from error


def _index_shard(label_key: str | None, url: str, name: str, tell: Tell) -> tuple[str, _ShardIndex]:
    place = storage.redact(storage.join(url, name))
    sizes: Counter[tuple[int, int]] = Counter()
    channels: Counter[int] = Counter()
    problems: list[str] = []

    def see(key: str, extension: str, data: bytes) -> None:
        try:
            size = header(io.BytesIO(data), name=f"{key}.{extension}")
        except BadImage as error:
            problems.append(f"{place}: {error}")
            return
        sizes[size.height, size.width] += 1
        channels[size.channels] += 1
        tell(1)

    try:
        if label_key is None:
            found = read_shard(url, name, see=see)
        else:
            found = read_shard(url, name, see=see, label_file="json", label_of=partial(from_json, key=label_key))
    except DamagedTar as error:
        return name, _ShardIndex(None, (), sizes, channels, Counter(), (), (str(error),))
    except OSError as error:
        return name, _ShardIndex(
            None, (), sizes, channels, Counter(), (), (f"{place}: cannot be read: {storage.why(error, reading=True)}",)
        )
    problems += found.problems
    if not found.samples:
        ends = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        hint = f"; {split_by_webdataset(found.dotted[0])}" if found.dotted else ""
        problems.append(f"{place}: holds no image (a member that ends in {ends}){hint}")
    labels: list[Label] = []
    for key, sample in found.samples.items():
        if isinstance(sample.label, BadLabel):
            problems.append(f"{place}: {key!r}: {sample.label}")
        elif sample.label is not None:
            labels.append(sample.label)
        elif label_key is not None:
            problems.append(f"{place}: {key!r}: has no .json to take {label_key!r} from")
    if labels and len(labels) < len(found.samples) and not problems:
        without = next(key for key, sample in found.samples.items() if sample.label is None)
        problems.append(
            f"{place}: {len(found.samples) - len(labels):,} of {len(found.samples):,} images have no .cls "
            f"({without!r}, for one)"
        )
    shard = None if problems else _shard(name, found)
    return name, _ShardIndex(shard, tuple(labels), sizes, channels, found.passed_over, found.dotted, tuple(problems))


def _shard(name: str, found: ShardScan) -> Shard:
    samples = found.samples.values()
    return Shard(
        name=name,
        bytes=found.bytes,
        sha256=found.sha256,
        keys=tuple(found.samples),
        offsets=tuple(sample.offset for sample in samples),
        sizes=tuple(sample.size for sample in samples),
        extensions=tuple(sample.extension for sample in samples),
        labels=None,
        crc32=tuple(sample.crc32 for sample in samples),
    )


def _join(found: list[_ShardIndex], shown: str, label_key: str | None) -> Manifest:
    problems = [problem for indexed in found for problem in indexed.problems]
    shards = tuple(indexed.shard for indexed in found if indexed.shard is not None)
    owners: dict[str, str] = {}
    for shard in shards:
        for key in shard.keys:
            other = owners.setdefault(key, shard.name)
            if other != shard.name:
                problems.append(f"{shown}: the key {key!r} is in {other} and in {shard.name}; keys must be unique")
    unlabelled = [indexed.shard.name for indexed in found if indexed.shard is not None and not indexed.labels]
    if unlabelled and len(unlabelled) < len(shards):
        problems.append(f"{shown}: {unlabelled[0]} has no labels, and other shards have some")
    labels = [label for indexed in found for label in indexed.labels]
    classes: tuple[str, ...] | None = None
    if labels and not problems:
        try:
            classes, number_of = classes_of(labels)
        except BadLabel as error:
            problems.append(f"{shown}: {error}")
        else:
            shards = tuple(
                replace(shard, labels=tuple(number_of[label] for label in indexed.labels))
                for shard, indexed in zip(shards, found, strict=True)
            )
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN:,} more"] if len(problems) > MAX_SHOWN else []
        raise UserError(
            f"{shown}: the shards cannot be indexed:",
            *(f"- {problem}" for problem in problems[:MAX_SHOWN]),
            *more,
            "Write or copy the damaged shards again, remove them from the folder, or pack the images anew.",
        )
    sizes: Counter[tuple[int, int]] = sum((indexed.sizes for indexed in found), Counter())
    channels: Counter[int] = sum((indexed.channels for indexed in found), Counter())
    sides = {side for size in sizes for side in size}
    return Manifest(
        resolution=sides.pop() if len(sides) == 1 else None,
        channels=max(channels),
        classes=classes,
        shards=shards,
        origin=f"{_FROM_JSON}{label_key!r}" if label_key else "dist-gan index",
    )


def _verify_shard(look_inside: bool, url: str, expected: _VerifyJob, tell: Tell) -> tuple[str, list[str]]:
    shard = expected.shard
    place = storage.redact(storage.join(url, shard.name))
    problems: list[str] = []

    def see(key: str, extension: str, data: bytes) -> None:
        if look_inside:
            problem = _problem_of_image(data, f"{key}.{extension}", expected)
            if problem:
                problems.append(f"{place}: {problem}")
        tell(1)

    try:
        found = read_shard(url, shard.name, see=see)
    except FileNotFoundError:
        return shard.name, [f"{place}: is not there"]
    except OSError as error:
        return shard.name, [f"{place}: cannot be read: {storage.why(error, reading=True)}"]
    except DamagedTar as error:
        return shard.name, [*problems, str(error)]
    if found.bytes != shard.bytes:
        problems.append(f"{place}: has {found.bytes:,} bytes, the manifest says {shard.bytes:,}")
    if found.sha256 != shard.sha256:
        problems.append(f"{place}: has the sha256 {found.sha256}, the manifest says {shard.sha256}")
    problems += found.problems
    problems += [f"{place}: {problem}" for problem in _differences(expected, found)]
    return shard.name, problems


def _problem_of_image(data: bytes, name: str, expected: _VerifyJob) -> str | None:
    try:
        height, width, channels = decode(data, name=name).shape
    except BadImage as error:
        return str(error)
    side = expected.resolution
    if side is not None and (height, width) != (side, side):
        return f"{name}: is {width}x{height}, the manifest says {side}x{side}"
    if channels > expected.channels:
        return f"{name}: has {channels} channels, the manifest says {expected.channels}"
    return None


def _differences(expected: _VerifyJob, found: ShardScan) -> list[str]:
    shard = expected.shard
    problems: list[str] = []
    for row, key in enumerate(shard.keys):
        sample = found.samples.get(key)
        if sample is None:
            problems.append(f"{key!r} is in the manifest and not in the tar")
            continue
        stated = (shard.offsets[row], shard.sizes[row], shard.extensions[row])
        real = (sample.offset, sample.size, sample.extension)
        if stated != real:
            problems.append(f"{key!r}: offset, size and extension are {real}, the manifest says {stated}")
        if shard.crc32 is not None and shard.crc32[row] != sample.crc32:
            problems.append(f"{key!r}: its CRC-32 is not the manifest's")
        if sample.label is not None and shard.labels is not None and expected.labels_in_cls:
            if isinstance(sample.label, BadLabel):
                problems.append(f"{key!r}: {sample.label}, the manifest says {shard.labels[row]}")
            elif sample.label != shard.labels[row]:
                problems.append(f"{key!r}: .cls holds {sample.label}, the manifest says {shard.labels[row]}")
    unknown = sorted(found.samples.keys() - set(shard.keys))
    return problems + [f"{key!r} is in the tar and not in the manifest" for key in unknown]
