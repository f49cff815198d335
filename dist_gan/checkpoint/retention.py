"""Deletes old checkpoints, and writes the files by which a rollback marks checkpoints. Only rank 0 calls this module.

Checkpoints are compared by serial number, never by name: as text, 10000 comes before 9999.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_gan import records, storage
from dist_gan.checkpoint import reader, schema
from dist_gan.checkpoint.reader import Entry
from dist_gan.config import CheckpointSection
from dist_gan.records import Damaged, Record
from dist_gan.types import UserError

INTENT = "rollback.json"
"""Name of the file beside the checkpoints that describes an unfinished rollback, so that a restarted run can finish it."""
_RESTORE = "; a rollback was under way: restore the file, or delete it to go on from the newest checkpoint"


def retire(folder: str, newest: str, section: CheckpointSection) -> None:
    """Deletes the checkpoints that the settings do not keep, if the newest checkpoint is intact.

    A failed deletion is ignored; the next call tries again.
    """
    if reader.verify(newest):
        return
    found = list(reader.entries(folder))[::-1]
    alive = [entry for entry in found if entry.is_committed and not entry.is_abandoned]
    retained = {entry.url for entry in alive[-section.keep :]} | {newest}
    retained |= {entry.url for entry in [entry for entry in alive if entry.is_healthy][-1:]}
    retained |= _milestones(alive, section.keep_every) | _best(alive, section.keep_best)
    serial = reader.serial_of(newest)
    for entry in found:
        if entry.url in retained or (not entry.is_committed and entry.serial > serial):
            continue
        try:
            storage.remove(storage.join(entry.url, reader.COMMIT))
            storage.remove_folder(entry.url)
        except OSError:
            continue  # without COMMIT the folder is no checkpoint, and the next call deletes the rest


def _milestones(alive: Sequence[Entry], every: int | None) -> set[str]:
    """Returns the URLs of the first checkpoint at or after each multiple of `every` images; none if `every` is None."""
    found, last = set(), -1
    for entry in alive if every else ():
        if entry.images // (every or 1) > last:
            found.add(entry.url)
            last = entry.images // (every or 1)
    return found


def _best(alive: Sequence[Entry], wanted: str | None) -> set[str]:
    """Returns the URL of the checkpoint with the lowest value of the scalar `wanted`, or with the highest for
    `-scalar`."""
    if not wanted:
        return set()
    name, sign = wanted.removeprefix("-"), -1.0 if wanted.startswith("-") else 1.0
    values = {}
    for entry in alive:
        try:
            value = reader.read_manifest(entry.url).get("scalars", {}).get(name, math.nan)
        except Damaged:
            continue
        if math.isfinite(value):
            values[entry.url] = sign * value
    return {min(values, key=lambda url: values[url])} if values else set()


# -- rollbacks ----------------------------------------------------------------------------------------------------


def intend_rollback(folder: str, target: str, intent: Mapping[str, Any]) -> None:
    """Writes down, before any other step of a rollback, that all checkpoints newer than `target` are abandoned."""
    value = {"target": target.rsplit("/", 1)[-1], **intent}
    storage.publish(storage.join(folder, INTENT), json.dumps(value).encode())


def intended_rollback(folder: str) -> dict[str, Any] | None:
    """Reads the description of a rollback that a killed process left unfinished; None if there is no such rollback.

    Raises:
        UserError: the description is damaged. If it were ignored, a run could resume from an abandoned checkpoint.
        TrainingFailed: the store does not answer.
    """
    try:
        intent = records.load(storage.join(folder, INTENT), remedy=_RESTORE)
        if "/" in intent.text("target") or not reader.is_name(intent.text("target")):
            raise intent.problem("target", "a checkpoint's name")
        _check(intent)
    except FileNotFoundError:
        return None
    except Damaged as error:
        text = str(error)
        raise UserError(text if _RESTORE in text else text + _RESTORE) from error
    return intent.values


def check_complete(intent: dict[str, Any], folder: str) -> None:
    """Raises `Damaged` unless the description of a rollback holds every entry that the rollback needs."""
    record = Record(intent, place=storage.redact(storage.join(folder, INTENT)), remedy=_RESTORE)
    schema.check_recovery(record.record("recovery"))
    schema.check_stream(record.record("stream"))
    record.number("seconds", low=0)


def _check(intent: Record) -> None:
    if "recovery" in intent:
        intent.record("recovery").whole("rollbacks")
    if "stream" in intent:
        schema.check_stream(intent.record("stream"))
    if "seconds" in intent:
        intent.number("seconds", low=0)


def abandon_after(folder: str, target: str) -> None:
    """Marks every checkpoint newer than `target` with a file ABANDONED."""
    serial = reader.serial_of(target)
    for other, name in reader.list_checkpoints(folder):
        if other > serial:
            storage.publish(storage.join(folder, name, reader.ABANDONED), b"")


def end_rollback(folder: str) -> None:
    """Deletes the description of a rollback, once the rollback has committed a checkpoint of its own."""
    storage.remove(storage.join(folder, INTENT))
