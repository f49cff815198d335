"""Reads the settings of a run from YAML and dotted overrides, and reports every mistake at once.

A mistake in one field does not hide the others: it is replaced by the default, so that the rules which join fields
speak in the same report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_gan import urls
from dist_gan.config import RunConfig
from dist_gan.config_help import schema_help as schema_help
from dist_gan.config_mistakes import DEFAULT_KINDS, UNKNOWN_KEY, validate
from dist_gan.config_rules import cross_field_mistakes
from dist_gan.config_text import UNFIT, apply_overrides, parse, problem_of, read_yaml
from dist_gan.mistakes import UserError
from dist_gan.wording import shown

_RESUMABLE_CHANGES = (
    "run.images",
    "run.resume",
    "run.dir",
    "run.profile",
    "data.url",
    "data.mix",
    "data.prefetch",
    "data.workers",
    "data.memory",
    "data.cache",
    "data.bad_images",
    "data.max_bad",
    "data.patience_s",
    "data.disk_cache",
    "data.disk_cache_bytes",
    "log",
    "checkpoint",
    "runtime",
    "recovery",
)
"""Settings that a resumed run may have otherwise than it started with."""
MAX_SHOWN = 50
"""Mistakes in a report."""


class Reading(NamedTuple):
    """Settings as far as they could be read, and everything that is wrong with them."""

    config: RunConfig
    """What is wrong has its default."""
    mistakes: list[str]
    """A sentence each, beginning with its place."""
    wrong: list[str]
    """Places whose values are not the user's."""
    source: str
    """What was read, for the report."""

    def is_wrong(self, place: str) -> bool:
        """Whether a place, or something in or around it, is not as the user wrote it."""
        return any(_overlap(place, other) for other in self.wrong)

    def report(self, more: Sequence[str] = ()) -> UserError | None:
        """One report of all mistakes and of more that were found elsewhere; None if there are none."""
        mistakes = [*self.mistakes, *more]
        if not mistakes:
            return None
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        rest = len(mistakes) - MAX_SHOWN
        return UserError(
            f"{count} in the configuration ({self.source}):",
            *mistakes[:MAX_SHOWN],
            *([f"and {rest:,} more"] if rest > 0 else []),
        )


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, world_size: int = 1) -> RunConfig:
    """The settings in a YAML file, with `section.key=value` overrides laid over them.

    Args:
        path: YAML file, or None for the defaults.
        overrides: dotted assignments; choosing another `kind` replaces its section.
        world_size: processes of the launch, which the batch has to divide by.

    Raises:
        UserError: one report of all mistakes, a line each with path, value and remedy.
    """
    reading = read_settings(path, overrides, world_size=world_size)
    report = reading.report()
    if report is not None:
        raise report
    return reading.config


def read_settings(path: str | Path | None, overrides: Sequence[str] = (), *, world_size: int = 1) -> Reading:
    """Settings and mistakes as in `load_config`, for a report that others have a part in."""
    raw, mistakes = read_yaml(Path(path)) if path is not None else ({}, [])
    mistakes += apply_overrides(raw, overrides, default_kinds=DEFAULT_KINDS)
    config, invalid = validate(raw)
    mistakes += [text for _, text in invalid]
    reading = Reading(config, mistakes, [place for place, _ in invalid], "defaults" if path is None else str(path))
    for touched, text in cross_field_mistakes(config, world_size):
        if not any(reading.is_wrong(place) for place in touched):
            mistakes.append(text)
    return reading


def run_dir_of(path: str | Path | None, overrides: Sequence[str]) -> str | None:
    """The local run folder that a configuration names, however wrong the rest of it may be; None if it names none.

    The default is no name: what was never asked for is nobody's to write in.
    """
    raw, _ = read_yaml(Path(path)) if path is not None else ({}, [])
    apply_overrides(raw, overrides, default_kinds=DEFAULT_KINDS)
    run = raw.get("run", {})
    value = run.get("dir") if isinstance(run, dict) else None
    if not isinstance(value, str):
        return None
    try:
        return urls.local_place_of(value, place="run.dir")
    except UserError:
        return None


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_hash(config: RunConfig) -> str:
    """Short name of the settings that decide what is learned; those a resumed run may change are left out."""
    text = json.dumps(_learning_settings(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_written(text: str, *, place: str, needed: str = "") -> tuple[RunConfig, list[str]]:
    """The settings that some version of the program has written with `to_yaml`, and those that this one does not know.

    A setting that an older version did not have gets its default. So does one that this version refuses, if a resumed
    run may change it or it is not needed.

    Args:
        text: YAML.
        place: where it stands, for the error.
        needed: the one section that matters; all by default.

    Raises:
        UserError: it is no such configuration.
    """
    try:
        raw = parse(text)
        if not isinstance(raw, dict):
            raise TypeError(f"it is a {type(raw).__name__}, not sections")
    except UNFIT as error:
        raise UserError(f"{place} is no configuration ({problem_of(error)})") from error
    config, mistakes = validate(raw)
    unknown = [name for name, text in mistakes if text.startswith(f"{name}: {UNKNOWN_KEY}")]
    for name, text in mistakes:
        is_free = any(_overlap(name, free) for free in _RESUMABLE_CHANGES)
        if name not in unknown and not is_free and (not needed or _overlap(name, needed)):
            raise UserError(f"{place} is no configuration of this version ({text})")
    return config, sorted(unknown)


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that differ although a resumed run has to keep them, as `place: before -> now`."""
    a, b = _learning_settings(before), _learning_settings(now)
    return [f"{k}: {shown(a.get(k))} -> {shown(b.get(k))}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _learning_settings(config: RunConfig) -> dict[str, Any]:
    flat = _flatten(config.model_dump(mode="json"))
    return {k: v for k, v in flat.items() if not any(_overlap(k, free) for free in _RESUMABLE_CHANGES)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")
