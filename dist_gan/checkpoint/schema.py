"""Checks types and ranges of all values in a checkpoint's manifest before any of them is used.

The hash in COMMIT only proves that the manifest is the one that was written. A manifest written by another program, or
changed together with its hash, is therefore checked like any other.
"""

from __future__ import annotations

import re

from dist_gan.checkpoint import tensorfile
from dist_gan.records import Damaged, Record

FORMAT = "dist_gan.checkpoint"
VERSION = 1
PLAYERS = ("discriminator", "generator")
LONGEST_CONFIG = 2**20
"""Largest length of the settings, written as YAML, in characters."""
MOST_DRAWS = 2**48
"""Largest number of batches that a run can have taken from its data."""
MOVED = {"objective": "progress"}
"""Former name of each renamed part of a run, under which earlier versions stored the part's tensors."""
_FILE = re.compile(r"data-[0-9]{5,18}-of-[0-9]{5,18}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALLEST_FILE = 8


def check(manifest: Record) -> None:
    """Checks a manifest against this version of the format; unknown keys are ignored.

    Raises:
        Damaged: an entry is missing, or has a wrong type or range.
    """
    manifest.whole("serial", low=1)
    manifest.whole("images")
    for name in ("attempt", "world_size"):
        if name in manifest:
            manifest.whole(name, low=1)
    for name in ("dist_gan", "torch", "python", "strategy", "config_hash"):
        if name in manifest:
            manifest.text(name)
    if "config" in manifest:
        manifest.text("config", longest=LONGEST_CONFIG)
    if manifest.values.get("classes") is not None:
        manifest.texts("classes")
    if "scalars" in manifest:
        scalars = manifest.record("scalars")
        for name, value in scalars.values.items():
            if type(value) not in (int, float):  # NaN and infinity are allowed: the log may have shown them
                raise scalars.problem(name, "a number")
    _check_files(manifest)
    _check_values(manifest)


def _check_files(manifest: Record) -> None:
    files = manifest.record("files")
    for name in files:
        if not _FILE.fullmatch(name):
            raise Damaged(f"{files.place} is damaged: it names a file {name!r:.200}{files.remedy}")
        file = files.record(name)
        file.whole("bytes", low=_SMALLEST_FILE)
        if not _SHA256.fullmatch(file.text("sha256")):
            raise file.problem("sha256", "64 hexadecimal digits")
    tensors = manifest.record("tensors")
    for name in tensors:
        tensor = tensors.record(name)
        facts = tensorfile.facts_in(tensor)
        if tensor.text("file") not in files:
            raise tensor.problem("file", "a file of this checkpoint")
        offsets = tensor.wholes("offsets", low=_SMALLEST_FILE)
        if len(offsets) != 2 or offsets[1] - offsets[0] != facts.nbytes:
            raise tensor.problem("offsets", f"a place of {facts.nbytes:,} bytes")


def _check_values(manifest: Record) -> None:
    """Checks the saved states of the parts that every checkpoint has. Raises `Damaged` for an invalid value."""
    values = manifest.record("values")
    for part in values:
        values.record(part)
    if "progress" in values:
        progress = values.record("progress")
        check_progress(progress)
        if progress.whole("images") != manifest.whole("images"):
            raise progress.problem("images", f"the {manifest.whole('images')} images of the manifest")
    if "recovery" in values:
        check_recovery(values.record("recovery"))
    if "stream" in values:
        check_stream(values.record("stream"))


def check_progress(progress: Record) -> None:
    """Checks the counters of a run's progress. Raises `Damaged` for an invalid counter."""
    images = progress.whole("images")
    for name in ("d_updates", "g_updates"):
        progress.whole(name)
    progress.whole("averaged_images", high=images)
    progress.number("seconds", low=0)


def check_recovery(recovery: Record) -> None:
    """Checks the counters of skipped updates and rollbacks. Raises `Damaged` for an invalid counter."""
    recovery.whole("rollbacks")
    for player in PLAYERS:
        recovery.record("skipped").whole(player)
        updates = recovery.record("updates").whole(player)
        recent = recovery.record("recent").wholes(player, low=1, high=updates)
        if recent != sorted(set(recent)):
            raise recovery.record("recent").problem(player, "a list of growing numbers")


def check_stream(stream: Record) -> None:
    """Checks the saved position in the order of the training data. Raises `Damaged` for an invalid value."""
    stream.whole("draw", high=MOST_DRAWS)
    stream.text("fingerprint")
    for pair in stream.values.get("damaged", []) if isinstance(stream.values.get("damaged", []), list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise stream.problem("damaged", "a list of pairs of a URL and a key")
