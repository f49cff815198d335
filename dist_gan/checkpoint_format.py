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
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dist_gan import storage, tensorfile
from dist_gan.types import UserError

FORMAT = "dist_gan.checkpoint"
VERSION = 1
COMMIT, HEALTHY, ABANDONED = "COMMIT", "HEALTHY", "ABANDONED"
_PART = 2**24
"""Bytes of a file that are held at a time while it is verified."""
_FILE = re.compile(r"data-\d{5,}-of-\d{5,}\.safetensors")
_NAME = re.compile(r"checkpoint-(\d{4,})-(\d{12,})")


class Found(NamedTuple):
    """What a search for a checkpoint came to."""

    url: str | None
    damaged: tuple[str, ...]
    """Newer ones that were passed over: file and reason."""


def newest(folder: str, *, healthy: bool = False) -> Found:
    """The newest committed checkpoint whose every file is as the manifest says, and what was wrong with newer ones.

    Those that a rollback has abandoned are passed over without a word; with `healthy`, those not marked so, too.
    """
    damaged: list[str] = []
    for _, name in reversed(listed(folder)):
        url = storage.join(folder, name)
        marks = storage.list_names(url)
        if COMMIT not in marks or ABANDONED in marks or (healthy and HEALTHY not in marks):
            continue
        problems = verify(url)
        if not problems:
            return Found(url, tuple(damaged))
        damaged.append(problems[0])
    return Found(None, tuple(damaged))


def verify(url: str) -> list[str]:
    """Everything that is wrong with a checkpoint; empty if it is whole."""
    try:
        manifest = read_manifest(url)
    except UserError as error:
        return [str(error)]
    problems = []
    for name, facts in manifest["files"].items():
        place = f"{storage.redact(url)}/{name}"
        try:
            head, size, digest = _digest(storage.join(url, name), place)
            _compare(size, digest, facts, place)
            tensorfile.check_head(head, size=size, name=place)
        except (UserError, ValueError) as error:
            problems.append(str(error))
    return problems


def read_manifest(url: str) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        UserError: there is none, COMMIT is not its hash, or another version wrote it.
    """
    place = storage.redact(url)
    try:
        data = storage.read(storage.join(url, "manifest.json"))
        commit = storage.read(storage.join(url, COMMIT))
    except FileNotFoundError as error:
        raise UserError(f"{place} is no committed checkpoint: {error.filename or error} is missing") from error
    if commit.strip() != hashlib.sha256(data).hexdigest().encode():
        raise UserError(f"{place} is damaged: COMMIT is not the hash of manifest.json; take another checkpoint")
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise UserError(f"{place} is damaged: manifest.json is no JSON ({error}); take another checkpoint") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        kind = manifest.get("format"), manifest.get("version") if isinstance(manifest, dict) else None
        raise UserError(
            f"{place} is of format {kind[0]!r} version {kind[1]!r}, and this program reads {FORMAT} version {VERSION}; "
            f"resume it with the program that wrote it"
        )
    strange = [n for n in manifest.get("files", ()) if not _FILE.fullmatch(n)]
    if strange:
        raise UserError(f"{place} is damaged: manifest.json names a file {strange[0]!r}; take another checkpoint")
    missing = {"files", "tensors", "values", "serial", "images"} - manifest.keys()
    if missing:
        raise UserError(
            f"{place} is damaged: manifest.json lacks {', '.join(sorted(missing))}; take another checkpoint"
        )
    return manifest


def read(url: str, *, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a checkpoint, on the CPU; `prefix` reads only the files that hold such names.

    Raises:
        UserError: it is damaged or not committed.
    """
    manifest = read_manifest(url)
    wanted = {e["file"] for name, e in manifest["tensors"].items() if name.startswith(prefix)}
    tensors: dict[str, Tensor] = {}
    for name in sorted(wanted):
        try:
            tensors |= tensorfile.from_bytes(_checked_file(url, name, manifest["files"][name]), name=name)
        except ValueError as error:
            raise UserError(f"{storage.redact(url)} is damaged: {error}; take another checkpoint") from error
    return manifest, {name: t for name, t in sorted(tensors.items()) if name.startswith(prefix)}


def _checked_file(url: str, name: str, facts: Mapping[str, Any]) -> bytes:
    place = f"{storage.redact(url)}/{name}"
    try:
        data = storage.read(storage.join(url, name))
    except FileNotFoundError as error:
        raise UserError(f"{place} is missing; take another checkpoint") from error
    _compare(len(data), hashlib.sha256(data).hexdigest(), facts, place)
    return data


def _digest(url: str, place: str) -> tuple[bytes, int, str]:
    """First bytes, size and sha256 of a file that need not fit into memory."""
    digest, size, head = hashlib.sha256(), 0, b""
    try:
        end = storage.size(url)
        while size < end and (part := storage.read(url, size, min(end, size + _PART))):
            head = head or part
            digest.update(part)
            size += len(part)
    except FileNotFoundError as error:
        raise UserError(f"{place} is missing; take another checkpoint") from error
    return head, size, digest.hexdigest()


def _compare(size: int, digest: str, facts: Mapping[str, Any], place: str) -> None:
    if size != facts["bytes"]:
        raise UserError(f"{place} is damaged: {size:,} bytes instead of {facts['bytes']:,}; take another checkpoint")
    if digest != facts["sha256"]:
        raise UserError(f"{place} is damaged: its bytes do not have the hash in the manifest; take another checkpoint")


def listed(folder: str) -> list[tuple[int, str]]:
    """Serials and names of all checkpoint folders, committed or not, oldest first."""
    found = [(int(m[1]), name) for name in storage.list_names(folder) if (m := _NAME.fullmatch(name))]
    return sorted(found)
