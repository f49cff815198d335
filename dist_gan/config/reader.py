"""Reads the settings of a run from YAML and dotted overrides, and reports every mistake at once.

A mistake in one setting does not hide others: the invalid setting is replaced by its default, so that rules about several
settings can be checked in the same report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_gan import urls
from dist_gan.config.help_text import schema_help as schema_help
from dist_gan.config.kinds import default_kinds
from dist_gan.config.mistakes import UNKNOWN_KEY, validate
from dist_gan.config.rules import cross_field_mistakes
from dist_gan.config.sections import RunConfig
from dist_gan.config.text import UNFIT, apply_overrides, parse, problem_of, read_yaml
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
"""Names of the sections and settings that may change when a run is resumed."""
MAX_SHOWN = 50
"""Largest number of mistakes that one report lists."""


class Reading(NamedTuple):
    """Result of reading a configuration: the settings, and all mistakes found in them."""

    config: RunConfig
    """Settings of the run; invalid settings hold their defaults."""
    mistakes: list[str]
    """Sentences about the mistakes, one per mistake, beginning with the name of the setting."""
    wrong: list[str]
    """Dotted names of the settings that hold their default because the user's value was invalid."""
    source: str
    """Name of the configuration's source for the report: the path of the file, or `defaults`."""

    def is_wrong(self, place: str) -> bool:
        """Returns whether a setting, or a setting inside or around it, was invalid and replaced by its default."""
        return any(_overlap(place, other) for other in self.wrong)

    def report(self, more: Sequence[str] = ()) -> UserError | None:
        """Returns one error that lists all mistakes, and `more` that were found elsewhere; None if there are none."""
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
    """Reads the settings in a YAML file, and applies the overrides `section.key=value` to them.

    Args:
        path: path of the YAML file, or None for the defaults.
        overrides: assignments `section.key=value`; another `kind` replaces the whole section.
        world_size: number of processes of the launch, over which the batch has to divide evenly.

    Raises:
        UserError: one report of all mistakes, one line per mistake with name, value and remedy.
    """
    reading = read_settings(path, overrides, world_size=world_size)
    report = reading.report()
    if report is not None:
        raise report
    return reading.config


def read_settings(path: str | Path | None, overrides: Sequence[str] = (), *, world_size: int = 1) -> Reading:
    """Reads settings and mistakes as `load_config` does, but raises no error, so that the report can be extended."""
    raw, mistakes = read_yaml(Path(path)) if path is not None else ({}, [])
    mistakes += apply_overrides(raw, overrides, default_kinds=default_kinds())
    config, invalid = validate(raw)
    mistakes += [text for _, text in invalid]
    reading = Reading(config, mistakes, [place for place, _ in invalid], "defaults" if path is None else str(path))
    for mistake in cross_field_mistakes(config, world_size):
        if not any(reading.is_wrong(place) for place in mistake.places):
            mistakes.append(mistake.text)
    return reading


def run_dir_of(path: str | Path | None, overrides: Sequence[str]) -> str | None:
    """Returns the local run folder that a configuration names, even if other settings are invalid; None if it names
    none.

    The default folder is not returned, because nothing is written into a folder that the user has not named.
    """
    raw, _ = read_yaml(Path(path)) if path is not None else ({}, [])
    apply_overrides(raw, overrides, default_kinds=default_kinds())
    run = raw.get("run", {})
    value = run.get("dir") if isinstance(run, dict) else None
    if not isinstance(value, str):
        return None
    try:
        return urls.local_place_of(value, place="run.dir")
    except UserError:
        return None


def to_yaml(config: RunConfig) -> str:
    """Returns the complete configuration as YAML text that `load_config` can read."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_hash(config: RunConfig) -> str:
    """Returns a hash, 16 hex digits, of the settings that must stay the same when a run is resumed."""
    text = json.dumps(_learning_settings(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_written(text: str, *, place: str, needed: str = "") -> tuple[RunConfig, list[str]]:
    """Reads settings written by `to_yaml` of any version; returns them, and the names of settings unknown to this
    version.

    A setting that an older version did not have gets its default. A setting that this version refuses gets its default, too,
    if a resumed run may change the setting or if the setting lies outside the section `needed`.

    Args:
        text: settings as YAML.
        place: name of the text's source, for the error.
        needed: the only section whose mistakes are errors; all sections by default.

    Raises:
        UserError: the text is no configuration, or holds a value that this version refuses.
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
    """Lists the settings that differ although a resumed run has to keep them, as `place: before -> now`."""
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
