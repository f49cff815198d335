"""Labels in `.cls`, `.json` and `dataset.json` files, as numbers or names, and the classes that result from them."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence

from dist_gan.json_text import parse_json

MAX_CLASSES = 2**20
LABEL_BYTES = 2**20
"""Largest size of a file with the label of one image, in bytes."""
_LONGEST_NAME = 200
_LONGEST_NUMBER = 15
_MANY = 1000
"""Number of classes above which names count as classes only if there are at most half as many of them as images; captions
of images are thereby refused."""

Label = int | str
"""A class, by number or by name."""


class BadLabel(ValueError):
    """An unusable label; the text names the mistake."""


def from_cls(data: bytes) -> int:
    """The number in a `.cls` file.

    Raises:
        BadLabel: the file holds no class number.
    """
    label = parse_cls(data)
    mistake = not_a_class(label)
    if mistake:
        shown = f"{data[:20]!r}" if label is None else f"{label:,}"
        raise BadLabel(f".cls holds {shown}, {mistake}")
    return int(label or 0)


def parse_cls(data: bytes) -> int | None:
    """The number in a `.cls` file; None if it is not a non-negative whole number."""
    text = data.strip()
    return int(text) if text.isdigit() and len(text) <= _LONGEST_NUMBER else None


def from_json(data: bytes, key: str) -> Label:
    """The class, by number or name, under a key of an image's `.json` file.

    Raises:
        BadLabel: the value is neither.
    """
    try:
        content = parse_json(data)
    except ValueError as error:
        raise BadLabel(f".json is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadLabel(f".json holds {reprlib.repr(content)}, and no object with {key!r} in it")
    value = content.get(key)
    if isinstance(value, str):
        name = value.strip()
        if not name or len(name) > _LONGEST_NAME or not _can_be_written(name):
            raise BadLabel(
                f".json holds {reprlib.repr(value)} under {key!r}, not the name of a class (1 to {_LONGEST_NAME} signs)"
            )
        return name
    mistake = not_a_class(value)
    if mistake or value is None:
        names = f"; it has {', '.join(map(reprlib.repr, list(content)[:8])) or 'nothing'}" if key not in content else ""
        or_name = " nor the name of a class" if mistake and mistake.startswith("not") else ""
        raise BadLabel(f".json holds {reprlib.repr(value)} under {key!r}, {mistake}{or_name}{names}")
    return int(value)


def classes_of(labels: Collection[Label]) -> tuple[tuple[str, ...], dict[Label, int]]:
    """Names of the classes, and the class number of each label. Numeric texts count as numbers, other texts are sorted.

    Raises:
        BadLabel: numbers and names are mixed, or there are too many different names.
    """
    found = set(labels)
    names = sorted(label for label in found if isinstance(label, str))
    numbers = sorted(label for label in found if isinstance(label, int))
    if all(_is_number(name) for name in names):
        number_of = {label: int(label) for label in found}
        highest = max(number_of.values())
        mistake = not_a_class(highest)
        if mistake:
            raise BadLabel(f"the highest label is {highest:,}, {mistake}")
        return numbered_classes([highest]), number_of
    if numbers:
        raise BadLabel(
            f"some labels are numbers ({numbers[0]}, for one) and others are names ({names[0]!r}); use one kind"
        )
    if len(names) > MAX_CLASSES or (len(names) > _MANY and 2 * len(names) > len(labels)):
        raise BadLabel(
            f"{len(labels):,} images have {len(names):,} different texts ({names[0]!r}, for one), which are no classes; "
            f"name the key of a class"
        )
    return tuple(names), {name: number for number, name in enumerate(names)}


def numbered_classes(labels: Sequence[int]) -> tuple[str, ...]:
    """Names of numbered classes: "0" up to the highest number, which is below `MAX_CLASSES`."""
    return tuple(str(number) for number in range(max(labels) + 1))


def not_a_class(label: object) -> str | None:
    """Reason, as the continuation of a sentence, for which a value is not a class number; None if it is one."""
    if type(label) is not int or label < 0:
        return "not a whole number from 0 on"
    if label >= MAX_CLASSES:
        return f"and there are at most {MAX_CLASSES:,} classes, numbered from 0"
    return None


def parse_label_file(data: bytes) -> tuple[dict[str, int] | None, str | None]:
    """Labels in a `dataset.json` by file name, None for "no labels"; and the mistake in it, None if there is none."""
    try:
        content = parse_json(data)
    except ValueError as error:
        return None, f"is not JSON ({error})"
    pairs = content.get("labels", ...) if isinstance(content, dict) else ...
    if pairs is None:
        return None, None
    shape = 'must be {"labels": [["folder/name.png", 6], ...]} or {"labels": null}'
    if not isinstance(pairs, list) or not pairs:
        return None, shape
    labels: dict[str, int] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            return None, f"{shape}, and holds {reprlib.repr(pair)}"
        name, label = pair
        mistake = not_a_class(label)
        if mistake:
            return None, f"the label of {name!r} is {reprlib.repr(label)}, {mistake}"
        if name in labels:
            return None, f"{name!r} has two labels"
        labels[name] = label
    return labels, None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold lone surrogates
        return False
    return True
