"""Finds, verifies and reads checkpoints. Reading needs no running training, no process group and no pickle.

    checkpoint-0007-000000012800/           folder of a checkpoint: serial number, and number of images seen
        data-00000-of-00002.safetensors     tensors; each rank writes one file, of about equal size
        manifest.json                       file and position of each tensor, size and sha256 of each file, other state
        COMMIT                              sha256 of manifest.json; written last
        HEALTHY                             empty file, added later if no update was skipped after the checkpoint
        ABANDONED                           empty file, added later if a rollback returned to an earlier checkpoint

A folder is a checkpoint only if it has COMMIT and COMMIT holds the sha256 of manifest.json. docs/checkpoints.md describes
the whole format.
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
"""End of every error sentence about a damaged checkpoint; it names the remedy."""
_PART = 2**24
"""Number of bytes of a file that are held in memory at a time while the file is verified."""
_NAME = re.compile(r"checkpoint-([0-9]{4,18})-([0-9]{12,18})")


class SearchResult(NamedTuple):
    """Result of a search for the newest usable checkpoint in a folder; `url` is None if there is no such checkpoint."""

    url: str | None
    damaged: tuple[str, ...]
    """Sentences about newer checkpoints that were skipped because they are damaged: file and reason."""


class Entry(NamedTuple):
    """Facts about a checkpoint folder that its name and its file names tell, without reading any file."""

    url: str
    serial: int
    images: int
    marks: frozenset[str]
    """File names in the folder that mark its status, such as COMMIT."""
    problem: str | None
    """Reason for which the folder cannot be listed; None if the folder can be listed."""

    @property
    def is_committed(self) -> bool:
        """True if the folder has COMMIT, the file that is written last, or if the folder cannot be listed."""
        return COMMIT in self.marks or self.problem is not None

    @property
    def is_abandoned(self) -> bool:
        """True if a rollback has returned training to an earlier checkpoint; no run resumes from an abandoned one."""
        return ABANDONED in self.marks

    @property
    def is_healthy(self) -> bool:
        """True if the checkpoint is marked HEALTHY, because training continued without skipped updates after it."""
        return HEALTHY in self.marks


class Commit(NamedTuple):
    """URL and number of images seen of a committed, that is, completely written checkpoint.

    Its files may have been damaged since.
    """

    url: str
    images: int


def entries(folder: str) -> Iterator[Entry]:
    """Yields the checkpoints in a folder, the newest first, whether they are committed or not.

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
    """Finds the newest committed checkpoint whose files all match its manifest, and the damage in newer checkpoints.

    A checkpoint is skipped silently if a rollback has abandoned it, or, with `healthy`, if it is not marked healthy.

    Args:
        folder: URL of the folder that holds the checkpoints.
        healthy: consider only checkpoints marked healthy.
        before: consider only checkpoints with a lower serial.

    Raises:
        TrainingFailed: the store does not answer, so that the checkpoints in the folder are unknown.
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
    """Finds the newest checkpoint that is committed and not abandoned, by file names alone, without reading any file.

    This function is for the end of a run, when there is no time to compare hashes. It returns None if there is no such
    checkpoint, or if the folder cannot be read.
    """
    try:
        return next(
            (Commit(e.url, e.images) for e in entries(folder) if COMMIT in e.marks and not e.is_abandoned), None
        )
    except (OSError, UserError, TrainingFailed):
        return None


def verify(url: str) -> list[str]:
    """Returns a sentence about every damage found in a checkpoint; an empty list if the checkpoint is intact.

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
    """Reads the manifest of a committed checkpoint, and checks the types and ranges of all its values.

    Raises:
        Damaged: the manifest is missing, COMMIT is not its hash, its format version is unknown, or a value is invalid.
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
    """Reads the manifest and the tensors of a checkpoint to the CPU.

    With `prefix`, only the files are read that hold tensors whose names begin with `prefix`, and only those tensors are
    returned.

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
    """Returns the shape and dtype that a manifest lists for each tensor whose name begins with `prefix`.

    The returned names are without `prefix`.
    """
    return {
        name.removeprefix(prefix): _facts(entry)
        for name, entry in manifest["tensors"].items()
        if name.startswith(prefix)
    }


def prefix_of(manifest: Mapping[str, Any], part: str) -> str | None:
    """Returns the prefix of the names of a part's tensors in a checkpoint; None if the checkpoint lacks the part.

    A part is one component of a run with a state of its own, such as the networks or the progress.
    """
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
    """Reads a file in pieces; returns the first bytes of the file, its size in bytes, and its sha256 in hex."""
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
    """Raises `Damaged` unless the header of a tensor file lists the tensors that the manifest lists for that file."""
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
    """Lists serial number and name of every checkpoint folder, the oldest first, whether committed or not.

    Raises:
        Damaged: the folder cannot be read.
        TrainingFailed: the store does not answer.
    """
    with records.reading(folder):
        names = storage.list_names(folder)
    found = [(int(m[1]), int(m[2]), name) for name in names if (m := _NAME.fullmatch(name))]
    return [(serial, name) for serial, _, name in sorted(found)]


def is_name(url: str) -> bool:
    """Returns whether the last component of a URL is the name of a checkpoint folder."""
    return _NAME.fullmatch(url.rstrip("/").rsplit("/", 1)[-1]) is not None


def serial_of(url: str) -> int:
    """Returns the serial number in the name of a checkpoint.

    Checkpoints are sorted by this number, because as text 10000 would come before 9999.

    Raises:
        Damaged: the last component of the URL is not the name of a checkpoint.
    """
    return int(_match(url)[1])


def images_of(url: str) -> int:
    """Returns the number of images seen in the name of a checkpoint. Raises `Damaged` for any other name."""
    return int(_match(url)[2])


def _match(url: str) -> re.Match[str]:
    match = _NAME.fullmatch(url.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        raise Damaged(f"{storage.redact(url)} has no checkpoint's name")
    return match
