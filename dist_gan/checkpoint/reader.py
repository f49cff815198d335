"""Reads checkpoints: discovery, verification, tensors. Needs no run, no rank and no pickle.

    checkpoint-0007-000000012800/           serial, and images seen
        data-00000-of-00002.safetensors     one a writing rank, tensors dealt out by size
        manifest.json                       where each tensor is; size and sha256 of each file; JSON state
        COMMIT                              sha256 of manifest.json, written last
        HEALTHY                             beside them, later: training went on well from here
        ABANDONED                           beside them, later: a rollback went back behind it

A folder without COMMIT, or whose COMMIT does not fit, is not a checkpoint. docs/checkpoints.md is the whole format.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dist_gan import records, storage
from dist_gan.checkpoint import schema, tensorfile
from dist_gan.checkpoint.schema import FORMAT, VERSION, check
from dist_gan.records import Damaged, Record
from dist_gan.types import TensorFacts, TrainingFailed, UserError

COMMIT, HEALTHY, ABANDONED = "COMMIT", "HEALTHY", "ABANDONED"
ANOTHER = "; take another checkpoint"
"""End of the error sentence for a damaged checkpoint."""
_PART = 2**24
"""Bytes of a file that are held at a time while it is verified."""
_NAME = re.compile(r"checkpoint-([0-9]{4,18})-([0-9]{12,18})")


class SearchResult(NamedTuple):
    """Result of a search for a checkpoint."""

    url: str | None
    damaged: tuple[str, ...]
    """Damaged newer checkpoints that were skipped, as file and reason."""


class Entry(NamedTuple):
    """Facts about a checkpoint folder known from its name and its file names alone."""

    url: str
    serial: int
    images: int
    marks: frozenset[str]
    """File names in the folder that mark its status, such as COMMIT."""
    problem: str | None
    """Reason for which the folder cannot be read; None if it can."""

    @property
    def is_committed(self) -> bool:
        """True if COMMIT, the last file, has been written, or if the folder cannot be read."""
        return COMMIT in self.marks or self.problem is not None

    @property
    def is_abandoned(self) -> bool:
        """True if a rollback went back to an earlier checkpoint."""
        return ABANDONED in self.marks

    @property
    def is_healthy(self) -> bool:
        """True if training continued well from this checkpoint."""
        return HEALTHY in self.marks


class Commit(NamedTuple):
    """A checkpoint that was committed; its files may have been damaged since."""

    url: str
    images: int


def entries(folder: str) -> Iterator[Entry]:
    """The checkpoints in a folder by serial, the newest first, committed or not.

    Raises:
        Damaged: the folder itself cannot be read.
        TrainingFailed: the store does not answer.
    """
    for serial, name in reversed(list_checkpoints(folder)):
        url, marks, problem = storage.join(folder, name), frozenset[str](), None
        try:
            with records.reading(url):
                marks = frozenset(storage.list_names(url))
        except Damaged as error:
            problem = str(error)
        yield Entry(url, serial, images_of(url), marks, problem)


def newest(folder: str, *, healthy: bool = False, before: int | None = None) -> SearchResult:
    """The newest committed checkpoint whose files all match its manifest, and the damage found in newer ones.

    Checkpoints abandoned by a rollback are skipped silently; with `healthy`, so are those not marked healthy.

    Args:
        folder: URL of the folder that holds the checkpoints.
        healthy: consider only checkpoints marked healthy.
        before: consider only checkpoints with a lower serial.

    Raises:
        TrainingFailed: the store does not answer, so that it is unknown which checkpoints it holds.
    """
    damaged: list[str] = []
    for entry in entries(folder):
        if before is not None and entry.serial >= before:
            continue
        if not entry.is_committed or entry.is_abandoned or (healthy and not entry.is_healthy and not entry.problem):
            continue
        problems = [entry.problem] if entry.problem else verify(entry.url)
        if not problems:
            return SearchResult(entry.url, tuple(damaged))
        damaged.append(problems[0])
    return SearchResult(None, tuple(damaged))


def newest_commit(folder: str) -> Commit | None:
    """The newest committed and not abandoned checkpoint, found by file names alone, without reading its files.

    Used when a run ends and there is no time to compare hashes. None if there is no such checkpoint, or if the folder
    cannot be read.
    """
    try:
        return next(
            (Commit(e.url, e.images) for e in entries(folder) if COMMIT in e.marks and not e.is_abandoned), None
        )
    except (OSError, UserError, TrainingFailed):
        return None


def verify(url: str) -> list[str]:
    """Sentences about all damage found in a checkpoint; empty if it is intact.

    Raises:
        TrainingFailed: the store does not answer.
    """
    try:
        manifest = read_manifest(url)
    except Damaged as error:
        return [str(error)]
    problems = []
    for name, facts in manifest["files"].items():
        place = f"{storage.redact(url)}/{name}"
        try:
            head, size, digest = _digest(storage.join(url, name), place)
            _compare(size, digest, facts, place)
            _compare_header(head, size, manifest, name, place)
        except Damaged as error:
            problems.append(str(error))
    return problems


def read_manifest(url: str) -> dict[str, Any]:
    """The manifest of a committed checkpoint, with types and ranges of all values checked.

    Raises:
        Damaged: there is no manifest, COMMIT is not its hash, its format version is another, or a value is invalid.
        TrainingFailed: the store does not answer.
    """
    place = storage.redact(url)
    try:
        data = records.read(storage.join(url, "manifest.json"))
        commit = records.read(storage.join(url, COMMIT), limit=2**10)
    except FileNotFoundError as error:
        raise Damaged(f"{place} is no committed checkpoint: {error.filename or error} is missing") from error
    if commit.strip() != hashlib.sha256(data).hexdigest().encode():
        raise Damaged(f"{place} is damaged: COMMIT is not the hash of manifest.json{ANOTHER}")
    name = f"{place}/manifest.json"
    manifest = Record(records.parse(data, place=name), place=name, remedy=ANOTHER)
    kind = manifest.values.get("format"), manifest.values.get("version")
    if kind != (FORMAT, VERSION):
        raise Damaged(
            f"{place} is of format {kind[0]!r:.80} version {kind[1]!r:.80}, and this program reads {FORMAT} version "
            f"{VERSION}; resume it with the program that wrote it"
        )
    check(manifest)
    named = _NAME.fullmatch(url.rstrip("/").rsplit("/", 1)[-1])
    if named is not None and (int(named[1]), int(named[2])) != (manifest.values["serial"], manifest.values["images"]):
        raise Damaged(
            f"{place} is damaged: its manifest is that of serial {manifest.values['serial']} at "
            f"{manifest.values['images']:,} images; give a copied checkpoint another kind of name{ANOTHER}"
        )
    return manifest.values


def read(url: str, *, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a checkpoint, on the CPU; with `prefix`, only the files with tensor names that begin so.

    Raises:
        Damaged: the checkpoint is damaged or not committed.
        TrainingFailed: the store does not answer.
    """
    manifest = read_manifest(url)
    wanted = {e["file"] for name, e in manifest["tensors"].items() if name.startswith(prefix)}
    tensors: dict[str, Tensor] = {}
    for name in sorted(wanted):
        place = f"{storage.redact(url)}/{name}"
        data = _checked_file(url, name, manifest["files"][name], place)
        _compare_header(data, len(data), manifest, name, place)
        try:
            tensors |= tensorfile.from_bytes(data, name=name)
        except ValueError as error:
            raise Damaged(f"{storage.redact(url)} is damaged: {error}{ANOTHER}") from error
    return manifest, {name: t for name, t in sorted(tensors.items()) if name.startswith(prefix)}


def announced(manifest: Mapping[str, Any], *, prefix: str) -> dict[str, TensorFacts]:
    """Shapes and dtypes, as listed in a manifest, of the tensors under `prefix`; names are returned without it."""
    return {
        name.removeprefix(prefix): _facts(entry)
        for name, entry in manifest["tensors"].items()
        if name.startswith(prefix)
    }


def prefix_of(manifest: Mapping[str, Any], part: str) -> str | None:
    """Beginning of the names of a part's tensors in a checkpoint; None if the checkpoint lacks the part."""
    if part in manifest["values"]:
        return f"{part}/"
    former = f"{schema.MOVED[part]}/" if part in schema.MOVED else None
    return former if former and any(name.startswith(former) for name in manifest["tensors"]) else None


def _facts(entry: Mapping[str, Any]) -> TensorFacts:
    return TensorFacts(tuple(entry["shape"]), tensorfile.DTYPES[entry["dtype"]])


def _checked_file(url: str, name: str, facts: Mapping[str, Any], place: str) -> bytes:
    try:
        _compare_size(records.size(storage.join(url, name)), facts, place)
        data = records.read(storage.join(url, name), limit=facts["bytes"])
    except FileNotFoundError as error:
        raise Damaged(f"{place} is missing{ANOTHER}") from error
    _compare(len(data), hashlib.sha256(data).hexdigest(), facts, place)
    return data


def _digest(url: str, place: str) -> tuple[bytes, int, str]:
    """First bytes, size and sha256 of a file that need not fit into memory."""
    digest, size, head = hashlib.sha256(), 0, b""
    try:
        end = records.size(url)
        while size < end and (part := records.read(url, size, min(end, size + _PART))):
            head = head or part
            digest.update(part)
            size += len(part)
    except FileNotFoundError as error:
        raise Damaged(f"{place} is missing{ANOTHER}") from error
    return head, size, digest.hexdigest()


def _compare(size: int, digest: str, facts: Mapping[str, Any], place: str) -> None:
    _compare_size(size, facts, place)
    if digest != facts["sha256"]:
        raise Damaged(f"{place} is damaged: its bytes do not have the hash in the manifest{ANOTHER}")


def _compare_size(size: int, facts: Mapping[str, Any], place: str) -> None:
    if size != facts["bytes"]:
        raise Damaged(f"{place} is damaged: {size:,} bytes instead of {facts['bytes']:,}{ANOTHER}")


def _compare_header(head: bytes, size: int, manifest: Mapping[str, Any], file: str, place: str) -> None:
    """Raises Damaged unless the header of a tensor file lists the tensors that the manifest lists for it."""
    try:
        found = tensorfile.read_header(head, size=size, name=place)
    except ValueError as error:
        raise Damaged(f"{error}{ANOTHER}") from error
    expected = {
        name: tensorfile.TensorEntry(_facts(entry), *entry["offsets"])
        for name, entry in manifest["tensors"].items()
        if entry["file"] == file
    }
    if found != expected:
        strange = sorted({name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)})
        raise Damaged(f"{place} is damaged: its {strange[0]!r:.200} is not what the manifest says{ANOTHER}")


def list_checkpoints(folder: str) -> list[tuple[int, str]]:
    """Serials and names of all checkpoint folders, committed or not, oldest first.

    Raises:
        Damaged: the folder cannot be read.
        TrainingFailed: the store does not answer.
    """
    with records.reading(folder):
        names = storage.list_names(folder)
    found = [(int(m[1]), int(m[2]), name) for name in names if (m := _NAME.fullmatch(name))]
    return [(serial, name) for serial, _, name in sorted(found)]


def is_name(url: str) -> bool:
    """True if the last part of a URL is a checkpoint's name."""
    return _NAME.fullmatch(url.rstrip("/").rsplit("/", 1)[-1]) is not None


def serial_of(url: str) -> int:
    """Serial number in a checkpoint's name. Names are compared by it: as text, 10000 would come before 9999.

    Raises:
        Damaged: the name is not that of a checkpoint.
    """
    return int(_match(url)[1])


def images_of(url: str) -> int:
    """Number of images seen at a checkpoint, from its name. Raises Damaged as `serial_of` does."""
    return int(_match(url)[2])


def _match(url: str) -> re.Match[str]:
    match = _NAME.fullmatch(url.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        raise Damaged(f"{storage.redact(url)} has no checkpoint's name")
    return match
