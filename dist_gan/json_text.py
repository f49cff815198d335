"""Parser for JSON from outside the program; any unusable text raises ValueError and no other exception."""

from __future__ import annotations

import json
import reprlib
from typing import Any


def parse_json(data: bytes | str, *, unique_names: bool = False) -> Any:
    """Returns the value of a JSON text from an outside source.

    Args:
        data: the text; bytes are UTF-8, UTF-16 or UTF-32.
        unique_names: treats a name that occurs twice in one object as an error; otherwise its last value counts.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has numbers of thousands of digits.
    """
    try:
        return json.loads(data, object_pairs_hook=_object_of_unique_names if unique_names else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("it holds a number of thousands of digits") from error
        raise


def _object_of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        shown = repr(twice) if len(twice) < 80 else reprlib.repr(twice)
        raise ValueError(f"the name {shown} is there twice")
    return values
