"""Validates a configuration: converts dictionaries to typed settings, and every mistake to a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dist_gan.config.kinds import classes_of, kinds_of
from dist_gan.config.sections import RunConfig
from dist_gan.config.values import Ramp
from dist_gan.wording import shown


def validate(raw: dict[str, Any]) -> tuple[RunConfig, list[tuple[str, str]]]:
    """Converts a dictionary to typed settings; returns them, and place and sentence of each mistake.

    An invalid setting is replaced by its default, so that rules about several settings can be checked in the same
    report. Every round removes an entry from the dictionary, whatever the schema is, so the loop ends.

    Raises:
        ValueError: even a configuration without any entry is not valid: a section has no default, or an invalid default.
    """
    mistakes: dict[str, str] = {}
    while True:
        try:
            return RunConfig.model_validate(raw), list(mistakes.items())
        except ValidationError as error:
            if not raw:
                raise ValueError(f"the defaults are not valid: {error}") from error
            found = error.errors()
        raw = json.loads(json.dumps(raw, default=str))
        dropped = False
        for item in found:
            place = place_of(item["loc"])
            dotted = ".".join(place)
            mistakes.setdefault(dotted, f"{dotted}: {_sentence(item, place)}")
            dropped = _drop(raw, place) or dropped
        if not dropped:
            raw = {}


def place_of(location: tuple[int | str, ...]) -> list[str]:
    """Returns the path of a setting in the user's file: pydantic's location without the tags of unions."""
    if not location:
        return ["the file"]
    name, *rest = (str(part) for part in location)
    place = [name]
    field = RunConfig.model_fields.get(name)
    if field is None:
        return [*place, *rest]
    kinds = kinds_of(field)
    section = kinds.get(rest.pop(0)) if kinds and rest else field.annotation
    if rest:
        place.append(rest.pop(0))
        inner = getattr(section, "model_fields", {}).get(place[1])
        if inner is not None and rest and kinds_of(inner):
            rest.pop(0)
    return place + [part for part in rest if part != "[key]"]


def _drop(raw: dict[str, Any], place: list[str]) -> bool:
    """Deletes the value at `place`, or else the innermost existing section around it; returns False if neither exists."""
    for depth in range(len(place), 0, -1):
        here: Any = raw
        for part in place[: depth - 1]:
            here = here.get(part) if isinstance(here, dict) else None
        if isinstance(here, dict) and place[depth - 1] in here:
            del here[place[depth - 1]]
            return True
    return False


UNKNOWN_KEY = "unknown key"


def _sentence(item: Any, place: list[str]) -> str:
    value = item["input"]
    said = shown(value) if not isinstance(value, Mapping) else "this section"
    match item["type"]:
        case "extra_forbidden":
            return f"{UNKNOWN_KEY} (value {said}); {_ELSEWHERE.get(place[-1]) or _known_keys(place)}"
        case "missing":
            return "is missing; it has no default, so give it a value"
        case "union_tag_invalid":
            kind = value.get("kind") if isinstance(value, Mapping) else value
            return f"there is no kind {shown(kind)}; choose one of {item['ctx']['expected_tags']}"
        case "literal_error":
            return f"{said} is not offered; choose one of {item['ctx']['expected']}"
        case "model_type" | "model_attributes_type":
            return f"{said} is no section; write keys and values below it"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return f"{said} is no whole number; write one such as 64, 10M or 128Ki"
        case "float_parsing" | "float_type" | "finite_number":
            return f"{said} is no number; write one such as 0.5, 1e-3 or 10M"
        case "bool_parsing" | "bool_type":
            return f"{said} is neither true nor false"
        case _:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            return f"{said} does not fit: it should be {message}"


_ELSEWHERE = {
    "static_graph": "it is not offered: under DDP's static graph the gradient of a penalty is not reduced, without a word",
    "find_unused_parameters": "it is not needed: the resting player is frozen, and every parameter of the other is used",
    "epochs": "progress is counted in images seen: set run.images",
    "steps": "progress is counted in images seen: set run.images",
    "batch_size": "the images of a discriminator update over all processes are run.batch",
    "gradient_accumulation_steps": "set runtime.micro_batch to the images that a process forwards at once",
    "mixed_precision": "it is in the launch file, or set runtime.precision",
}
"""Advice for setting names known from other trainers, which names the setting to use instead."""


def _known_keys(place: list[str]) -> str:
    """Returns advice for an unknown key: the keys of its section, and the kinds that have such a key."""
    if len(place) > 2:
        return f"a setting that moves has the keys {', '.join(Ramp.model_fields)}"
    if len(place) == 1:
        return f"the sections are {', '.join(RunConfig.model_fields)}"
    classes = classes_of(place[0])
    if len(classes) > 1:
        kinds = {cls.model_fields["kind"].default: cls for cls in classes}
        owners = [kind for kind, cls in kinds.items() if place[1] in cls.model_fields]
        if owners:
            return f"it belongs to {place[0]}.kind={' or '.join(owners)}, which is not the kind chosen"
        return "the keys are " + "; ".join(f"{kind}: {', '.join(cls.model_fields)}" for kind, cls in kinds.items())
    return f"the keys of {place[0]} are {', '.join(classes[0].model_fields)}"
