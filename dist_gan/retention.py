"""Retention of checkpoints, and the marks that a rollback leaves beside them. Rank 0 alone.

Checkpoints are compared by serial, never by name: as text 10000 comes before 9999.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_gan import checkpoint_format as form
from dist_gan import checkpoint_manifest, records, storage
from dist_gan.checkpoint_format import Entry
from dist_gan.config import CheckpointSection
from dist_gan.records import Damaged, Record
from dist_gan.types import UserError

INTENT = "rollback.json"
"""Beside the checkpoints while a rollback is under way: what a restart has to finish."""
_RESTORE = "; a rollback was under way: restore the file, or delete it to go on from the newest checkpoint"


def retire(folder: str, newest: str, section: CheckpointSection) -> None:
    """Deletes what nobody asked to keep, once the newest is known to be whole; a failure to delete is no failure."""
    if form.verify(newest):
        return
    found = list(form.entries(folder))[::-1]
    alive = [entry for entry in found if entry.is_committed and not entry.is_abandoned]
    kept = {entry.url for entry in alive[-section.keep :]} | {newest}
    kept |= {entry.url for entry in [entry for entry in alive if entry.is_healthy][-1:]}
    kept |= _milestones(alive, section.keep_every) | _best(alive, section.keep_best)
    serial = form.serial_of(newest)
    for entry in found:
        if entry.url in kept or (not entry.is_committed and entry.serial > serial):
            continue
        try:
            storage.remove(storage.join(entry.url, form.COMMIT))
            storage.remove_folder(entry.url)
        except OSError:
            continue  # without COMMIT it is no checkpoint, and the next retention tries again


def _milestones(alive: Sequence[Entry], every: int | None) -> set[str]:
    """The first at or after each multiple of `every` images."""
    found, last = set(), -1
    for entry in alive if every else ():
        if entry.images // (every or 1) > last:
            found.add(entry.url)
            last = entry.images // (every or 1)
    return found


def _best(alive: Sequence[Entry], wanted: str | None) -> set[str]:
    """The one with the lowest value of a scalar, or with the highest of `-scalar`."""
    if not wanted:
        return set()
    name, sign = wanted.removeprefix("-"), -1.0 if wanted.startswith("-") else 1.0
    values = {}
    for entry in alive:
        try:
            value = form.read_manifest(entry.url).get("scalars", {}).get(name, math.nan)
        except Damaged:
            continue
        if math.isfinite(value):
            values[entry.url] = sign * value
    return {min(values, key=lambda url: values[url])} if values else set()


# -- rollbacks ----------------------------------------------------------------------------------------------------


def intend_rollback(folder: str, target: str, intent: Mapping[str, Any]) -> None:
    """Writes down that everything after `target` is abandoned, before anything else of a rollback."""
    value = {"target": target.rsplit("/", 1)[-1], **intent}
    storage.publish(storage.join(folder, INTENT), json.dumps(value).encode())


def intended_rollback(folder: str) -> dict[str, Any] | None:
    """The rollback that a killed process has left unfinished.

    Raises:
        UserError: what is written of it is damaged. Going on without would revive what was abandoned.
        TrainingFailed: the store does not answer.
    """
    try:
        intent = records.load(storage.join(folder, INTENT), remedy=_RESTORE)
        if "/" in intent.text("target") or not form.is_name(intent.text("target")):
            raise intent.problem("target", "a checkpoint's name")
        _check(intent)
    except FileNotFoundError:
        return None
    except Damaged as error:
        text = str(error)
        raise UserError(text if _RESTORE in text else text + _RESTORE) from error
    return intent.values


def check_complete(intent: dict[str, Any], folder: str) -> None:
    """Raises Damaged unless a note of a rollback holds all that the rollback needs."""
    record = Record(intent, place=storage.redact(storage.join(folder, INTENT)), remedy=_RESTORE)
    checkpoint_manifest.check_recovery(record.record("recovery"))
    checkpoint_manifest.check_stream(record.record("stream"))
    record.number("seconds", low=0)


def _check(intent: Record) -> None:
    if "recovery" in intent:
        intent.record("recovery").whole("rollbacks")
    if "stream" in intent:
        checkpoint_manifest.check_stream(intent.record("stream"))
    if "seconds" in intent:
        intent.number("seconds", low=0)


def abandon_after(folder: str, target: str) -> None:
    """Marks every checkpoint that is newer than `target`."""
    serial = form.serial_of(target)
    for other, name in form.listed(folder):
        if other > serial:
            storage.publish(storage.join(folder, name, form.ABANDONED), b"")


def end_rollback(folder: str) -> None:
    """Says that the rollback's own checkpoint has been committed."""
    storage.remove(storage.join(folder, INTENT))
