"""Reads the settings of a run from YAML and dotted overrides, and reports every mistake at once.

A mistake in one field does not hide the others: it is replaced by the default, so that the rules which join fields
speak in the same report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from dist_gan import storage
from dist_gan.config import (
    AdamSection,
    ArticleNetworks,
    CheckpointSection,
    DCGANNetworks,
    EMASection,
    LogSection,
    MLPNetworks,
    ObjectiveSection,
    PointsData,
    Ramp,
    RecoverySection,
    RunConfig,
    RunSection,
    RuntimeSection,
    Section,
    SGDSection,
    ShapesData,
    ShardsData,
)
from dist_gan.types import UserError

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


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, world_size: int = 1) -> RunConfig:
    """The settings in a YAML file, with `section.key=value` overrides laid over them.

    Args:
        path: YAML file, or None for the defaults.
        overrides: dotted assignments; choosing another `kind` replaces its section.
        world_size: processes of the launch, which the batch has to divide by.

    Raises:
        UserError: one report of all mistakes, a line each with path, value and remedy.
    """
    source = str(path) if path is not None else "defaults"
    raw, mistakes = _read_yaml(Path(path)) if path is not None else ({}, [])
    mistakes += _apply_overrides(raw, overrides)
    config, invalid = _validate(raw)
    mistakes += [text for _, text in invalid]
    places = [place for place, _ in invalid]
    for touched, text in _cross_field_mistakes(config, world_size):
        if not any(_overlap(a, b) for a in touched for b in places):
            mistakes.append(text)
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise UserError(f"{count} in the configuration ({source}):", *mistakes)
    return config


def run_dir_of(path: str | Path | None, overrides: Sequence[str]) -> str | None:
    """The run folder that a configuration names, however wrong the rest of it may be; None if that cannot be told."""
    raw, _ = _read_yaml(Path(path)) if path is not None else ({}, [])
    _apply_overrides(raw, overrides)
    run = raw.get("run", {})
    value = run.get("dir", RunSection().dir) if isinstance(run, dict) else None
    return value if isinstance(value, str) and value else None


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key written twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        raw = _plain(yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader))
    except FileNotFoundError:
        return {}, [
            f"{path}: there is no such file; give the path of a YAML file, `ls configs` shows those that come along"
        ]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{path}: cannot be read ({error}); give a YAML file"]
    except RecursionError:
        return {}, [f"{path}: a section holds itself; write it out"]
    except yaml.YAMLError as error:
        return {}, [f"{path}: is not YAML ({' '.join(str(error).split())}); mend that line"]
    if raw is None:
        return {}, []
    if not isinstance(raw, dict):
        return {}, [f"{path}: holds a {type(raw).__name__} where sections are needed, such as `run:`"]
    return raw, []


def _plain(value: Any) -> Any:
    """What YAML gave, with keys as text and every section its own: an anchor used twice must not be one section."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Lays the assignments over `raw`, kinds first; returns what is wrong with them."""
    mistakes = []
    parsed = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name or not all(name.split(".")):
            mistakes.append(f"{text!r}: is no override; write section.key=value, such as run.images=10M")
            continue
        try:
            parsed.append((name.split("."), _plain(yaml.load(value, Loader=_StrictLoader))))
        except (yaml.YAMLError, RecursionError):
            mistakes.append(f"{text!r}: the value is not YAML, or names a key twice; put text in quotes")
    for parts, value in sorted(parsed, key=lambda item: item[0][-1] != "kind"):
        place = raw
        for part in parts[:-1]:
            inner = place.get(part)
            if not isinstance(inner, dict):
                inner = place[part] = {}
            place = inner
        if parts[-1] == "kind" and place.get("kind", _DEFAULT_KINDS.get(".".join(parts[:-1]))) != value:
            place.clear()
        place[parts[-1]] = value
    return mistakes


_DEFAULT_KINDS = {
    "data": "shapes", "networks": "dcgan", "objective": "relativistic", "g_optim": "adam", "d_optim": "adam",
}  # fmt: skip


def _validate(raw: dict[str, Any]) -> tuple[RunConfig, list[tuple[str, str]]]:
    """The configuration, and each mistake with its place; what is wrong is replaced by its default.

    Going on with the defaults is what lets the rules that join fields speak in the same report.
    """
    mistakes: dict[str, str] = {}
    while True:
        try:
            return RunConfig.model_validate(raw), list(mistakes.items())
        except ValidationError as error:
            raw = json.loads(json.dumps(raw, default=str))
            for item in error.errors():
                place = _place(raw, item["loc"])
                dotted = ".".join(place)
                mistakes.setdefault(dotted, f"{dotted}: {_sentence(item, place)}")
                _drop(raw, place)


def _place(raw: dict[str, Any], location: tuple[int | str, ...]) -> list[str]:
    """The path in the user's file: pydantic's location without the tags of unions."""
    tags = {"shapes", "shards", "points", "article", "dcgan", "mlp", "adam", "adamw", "sgd", "number", "ramp"}
    place: list[str] = []
    here: Any = raw
    for index, part in enumerate(location):
        if index and str(part) in tags and not (isinstance(here, dict) and part in here):
            continue
        place.append(str(part))
        here = here.get(part) if isinstance(here, dict) else None
    return place


def _drop(raw: dict[str, Any], place: list[str]) -> None:
    here: Any = raw
    for part in place[:-1]:
        if not isinstance(here, dict) or part not in here:
            return
        here = here[part]
    if isinstance(here, dict) and place[-1] in here:
        del here[place[-1]]
    elif len(place) > 1:
        _drop(raw, place[:-1])


_UNKNOWN_KEY = "unknown key"


def _sentence(item: Any, place: list[str]) -> str:
    value = item["input"]
    shown = f"{value!r}" if not isinstance(value, Mapping) else "this section"
    match item["type"]:
        case "extra_forbidden":
            return f"{_UNKNOWN_KEY} (value {shown}); {_ELSEWHERE.get(place[-1]) or _known_keys(place)}"
        case "missing":
            return "is missing; it has no default, so give it a value"
        case "union_tag_invalid":
            kind = value.get("kind") if isinstance(value, Mapping) else value
            return f"there is no kind {kind!r}; choose one of {item['ctx']['expected_tags']}"
        case "literal_error":
            return f"{shown} is not offered; choose one of {item['ctx']['expected']}"
        case "model_type" | "model_attributes_type":
            return f"{shown} is no section; write keys and values below it"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{shown} is no whole number; write one such as 64, 10M or 128Ki"
        case "float_parsing" | "float_type" | "finite_number":
            return f"{shown} is no number; write one such as 0.5, 1e-3 or 10M"
        case "bool_parsing" | "bool_type":
            return f"{shown} is neither true nor false"
        case _:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            return f"{shown} does not fit: it should be {message}"


_ELSEWHERE = {
    "static_graph": "it is not offered: under DDP's static graph the gradient of a penalty is not reduced, without a word",
    "find_unused_parameters": "it is not needed: the resting player is frozen, and every parameter of the other is used",
    "epochs": "progress is counted in images seen: set run.images",
    "steps": "progress is counted in images seen: set run.images",
    "batch_size": "the images of a discriminator update over all processes are run.batch",
    "gradient_accumulation_steps": "set runtime.micro_batch to the images that a process forwards at once",
    "mixed_precision": "it is in the launch file, or set runtime.precision",
}
"""Keys that other trainers have, and what there is here instead."""


def _known_keys(place: list[str]) -> str:
    """The keys of the section a mistyped key stands in, and the kinds that would know it."""
    homes: dict[str, tuple[type[Section], ...]] = {
        "data": (ShapesData, ShardsData, PointsData), "networks": (ArticleNetworks, DCGANNetworks, MLPNetworks),
        "g_optim": (AdamSection, SGDSection), "d_optim": (AdamSection, SGDSection),
    }  # fmt: skip
    if len(place) > 2:
        return f"a setting that moves has the keys {', '.join(Ramp.model_fields)}"
    if len(place) == 1:
        return f"the sections are {', '.join(RunConfig.model_fields)}"
    if place[0] in homes:
        kinds = {cls.model_fields["kind"].default: cls for cls in homes[place[0]]}
        owners = [kind for kind, cls in kinds.items() if place[1] in cls.model_fields]
        if owners:
            return f"it belongs to {place[0]}.kind={' or '.join(owners)}, which is not the kind chosen"
        return "the keys are " + "; ".join(f"{kind}: {', '.join(cls.model_fields)}" for kind, cls in kinds.items())
    annotation = RunConfig.model_fields[place[0]].annotation if place[0] in RunConfig.model_fields else None
    fields = getattr(annotation, "model_fields", {})
    return f"the keys of {place[0]} are {', '.join(fields)}"


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def _cross_field_mistakes(config: RunConfig, world_size: int) -> list[tuple[tuple[str, ...], str]]:
    """Rules that join fields: the places they read, and the sentence."""
    found: list[tuple[tuple[str, ...], str]] = []
    run, data, networks, objective = config.run, config.data, config.networks, config.objective
    batch, micro = run.batch, config.runtime.micro_batch
    if batch % world_size:
        found.append(
            (
                ("run.batch",),
                f"run.batch: {batch} images do not divide over {world_size} processes; "
                f"take {_nearest_multiple(batch, world_size)}, or start another number of processes",
            )
        )
    elif micro is not None and (batch // world_size) % micro:
        found.append(
            (
                ("run.batch", "runtime.micro_batch"),
                f"runtime.micro_batch: {batch // world_size} images a process do not divide into pieces of {micro}; "
                f"choose a divisor of {batch // world_size}",
            )
        )
    points = isinstance(data, PointsData)
    if points != isinstance(networks, MLPNetworks):
        found.append(
            (
                ("data", "networks.kind"),
                f"networks.kind: {networks.kind!r} does not fit data.kind {data.kind!r}; "
                f"points go with mlp, images with article or dcgan",
            )
        )
    if isinstance(data, ShapesData) and not points and not isinstance(networks, MLPNetworks):
        if (networks.resolution, networks.channels) != (32, 3):
            found.append(
                (
                    ("data", "networks.resolution", "networks.channels"),
                    f"networks.resolution: {networks.resolution} with {networks.channels} channels, but the embedded "
                    f"shapes are 32x32 in colour; set networks.resolution=32 networks.channels=3",
                )
            )
        if networks.classes not in (0, 12):
            found.append(
                (
                    ("data", "networks.classes"),
                    f"networks.classes: {networks.classes}, but the embedded shapes have 12 classes; take 12, or 0 for none",
                )
            )
    if isinstance(data, PointsData) and networks.classes not in (0, data.modes):
        found.append(
            (
                ("data.modes", "networks.classes"),
                f"networks.classes: {networks.classes}, but the points have {data.modes} classes; take that, or 0 for none",
            )
        )
    if not isinstance(data, PointsData) and data.lanes < world_size:
        found.append(
            (
                ("data.lanes",),
                f"data.lanes: {data.lanes} lanes cannot be dealt to {world_size} processes; take a multiple of {world_size}",
            )
        )
    if isinstance(data, ShardsData):
        for place, url in [("data.url", data.url), *(("data.mix", url) for url in data.mix)]:
            try:
                storage.check_url(url, place=place)
            except UserError as error:
                found.append(((place,), str(error)))
        if data.url in data.mix:
            found.append(
                (("data.mix",), f"data.mix: {storage.redact(data.url)!r} is data.url too; give it data.weight")
            )
        is_remote = any(storage.local_path(url) is None for url in data.sources)
        if is_remote and data.patience_s >= config.runtime.step_timeout_s:
            found.append(
                (
                    ("data.patience_s", "runtime.step_timeout_s"),
                    f"data.patience_s: {data.patience_s} s, but a rank that does nothing for "
                    f"runtime.step_timeout_s={config.runtime.step_timeout_s} is taken for dead; be less patient with stores, or "
                    f"more with ranks",
                )
            )
        if data.disk_cache and storage.scheme_of(data.disk_cache) != "file":
            found.append(
                (
                    ("data.disk_cache",),
                    f"data.disk_cache: {storage.redact(data.disk_cache)!r} is no local folder; give a path on a disk",
                )
            )
    if not run.dir or storage.scheme_of(run.dir) != "file":
        found.append(
            (
                ("run.dir",),
                f"run.dir: {storage.redact(run.dir)!r} is no local folder; logs are appended to, so give a path on a disk",
            )
        )
    starts = {"run.resume": None if run.resume in ("auto", "never") else run.resume, "run.init_from": run.init_from}
    for place, start in starts.items():
        if start is not None:
            try:
                storage.check_url(start, place=place)
            except UserError as error:
                found.append(((place,), str(error)))
    penalised = any(k != 0.0 for k in (objective.r1_gamma, objective.r2_gamma, objective.gradient_penalty))
    if penalised and isinstance(networks, DCGANNetworks) and networks.d_norm == "batch":
        found.append(
            (
                ("objective", "networks.d_norm"),
                "networks.d_norm: 'batch' mixes the images of a batch, so the gradient penalties of the objective would not "
                "be of each image; set networks.d_norm=none, or the penalties to 0",
            )
        )
    if objective.label_smoothing and objective.kind not in ("minimax", "nonsaturating"):
        found.append(
            (
                ("objective.label_smoothing", "objective.kind"),
                f"objective.label_smoothing: {objective.label_smoothing} has no effect with {objective.kind!r}, which has no "
                f"labels; set it to 0, or take minimax or nonsaturating",
            )
        )
    if objective.penalty_every > 1 and not penalised:
        found.append(
            (
                ("objective",),
                f"objective.penalty_every: {objective.penalty_every} has no effect without a penalty; set r1_gamma, "
                f"r2_gamma or gradient_penalty",
            )
        )
    return found


def _nearest_multiple(value: int, divisor: int) -> int:
    return max(divisor, round(value / divisor) * divisor)


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
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases, which the program never writes")
        raw = _plain(yaml.load(text, Loader=_StrictLoader))
        if not isinstance(raw, dict):
            raise TypeError(f"it is a {type(raw).__name__}, not sections")
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise UserError(f"{place} is no configuration ({' '.join(str(error).split())[:200]})") from error
    config, mistakes = _validate(raw)
    unknown = [name for name, text in mistakes if text.startswith(f"{name}: {_UNKNOWN_KEY}")]
    for name, text in mistakes:
        is_free = any(_overlap(name, free) for free in _RESUMABLE_CHANGES)
        if name not in unknown and not is_free and (not needed or _overlap(name, needed)):
            raise UserError(f"{place} is no configuration of this version ({text})")
    return config, sorted(unknown)


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that differ although a resumed run has to keep them, as `place: before -> now`."""
    a, b = _learning_settings(before), _learning_settings(now)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


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


def schema_help() -> str:
    """Every section and field with its default and docstring."""
    lines: list[str] = []
    for name, sections in _sections().items():
        for section in sections:
            kind = section.model_fields.get("kind")
            choice = f" (kind: {section.model_fields['kind'].default})" if kind and len(sections) > 1 else ""
            lines += ["", f"{name}{choice}: {' '.join((section.__doc__ or '').split())}"]
            for field_name, field in section.model_fields.items():
                default = "required" if field.is_required() else repr(field.default)
                lines.append(f"  {name}.{field_name} = {default}")
                lines.append(f"      {' '.join((field.description or '').split())}{_choices(field.annotation)}")
    lines += [
        "",
        "A setting that may move is a number or a ramp, written as {start: 2e-3, end: 0, images: 300k, shape: linear}.",
    ]
    return "\n".join(lines).lstrip("\n")


def _sections() -> dict[str, tuple[type[Section], ...]]:
    return {
        "run": (RunSection,),
        "data": (ShapesData, ShardsData, PointsData),
        "networks": (ArticleNetworks, DCGANNetworks, MLPNetworks),
        "objective": (ObjectiveSection,),
        "g_optim": (AdamSection, SGDSection),
        "d_optim": (AdamSection, SGDSection),
        "ema": (EMASection,),
        "runtime": (RuntimeSection,),
        "log": (LogSection,),
        "checkpoint": (CheckpointSection,),
        "recovery": (RecoverySection,),
    }


def _choices(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f" One of: {', '.join(str(a) for a in get_args(annotation))}."
    return ""
