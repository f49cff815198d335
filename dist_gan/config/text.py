"""Reads YAML files and dotted overrides as plain dictionaries, with limits on size, depth and number of values.

Only text, numbers, booleans, null, mappings and lists are read. Values that YAML 1.1 converts in a surprising way (1:30
to ninety, 010 to eight, dates) stay text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from dist_gan.wording import shown, unprintable

MAX_BYTES = 2**18
"""Largest size of a configuration file, in bytes."""
MAX_NODES = 20_000
"""Largest number of values in a configuration file; a value that an alias repeats counts each time."""
MAX_DEPTH = 16
"""Largest number of levels of nested sections."""

UNFIT = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)
"""Exceptions that PyYAML raises for text that is not YAML, or that PyYAML cannot read."""
_CORE = ("null", "bool", "int", "float", "str", "seq", "map", "merge")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_LONGEST_INT = 300
"""Largest number of digits of a whole number; a longer number stays text, which no setting accepts."""


def _short(tag: str) -> str:
    return tag.rpartition(":")[2]


def _of_tags(tags: tuple[str, ...]) -> dict[Any, Any]:
    """Returns YAML's implicit resolvers for the given tags only, by the first character of a plain scalar."""
    known = yaml.SafeLoader.yaml_implicit_resolvers.items()
    return {first: [(tag, known_by) for tag, known_by in found if _short(tag) in tags] for first, found in known}


class _Loader(yaml.SafeLoader):
    """Loads YAML safely: constructs values of YAML's core types only, and refuses duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._number = 0
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes a node of YAML. Raises ConstructorError if its values, with aliases expanded, are too many or too
        deep."""
        is_alias = self.check_event(yaml.AliasEvent)
        self._level += 1
        self._number += 1
        if self._number > MAX_NODES:
            raise ConstructorError(None, None, f"more than {MAX_NODES:,} values", self.peek_event().start_mark)
        if self._level > MAX_DEPTH:
            raise ConstructorError(None, None, f"sections lie deeper than {MAX_DEPTH}", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if is_alias and id(node) not in self._sizes:
            raise ConstructorError(None, None, "a section holds itself; write it out", self.peek_event().start_mark)
        if node is not None and not is_alias:
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        number = 1 + sum(self._sizes[id(part)][0] for part in parts)
        depth = 1 + max((self._sizes[id(part)][1] for part in parts), default=0)
        if number > MAX_NODES or depth > MAX_DEPTH:
            raise ConstructorError(
                None, None, f"more than {MAX_NODES:,} values, or deeper than {MAX_DEPTH}, with all that is repeated",
                node.start_mark,
            )  # fmt: skip
        return number, depth

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} is written twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and unprintable(value.rstrip("\n")):
            raise ConstructorError(None, None, "text with a sign that does not print", node.start_mark)
        return value


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    text = str(loader.construct_scalar(node))
    digits = text.replace("_", "")
    if len(digits) > _LONGEST_INT or not re.fullmatch(r"[-+]?(?:\d+|0x[0-9a-fA-F]+)", digits, re.ASCII):
        return text
    return int(digits, 16) if "x" in digits else int(digits)


_Loader.yaml_implicit_resolvers = _of_tags(("null", "bool", "merge"))
_Loader.yaml_constructors = {
    tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag is None or _short(tag) in _CORE
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads a YAML file as a dictionary; returns it, and mistakes that concern the whole file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            return {}, [f"{path}: is larger than {MAX_BYTES // 1024} KiB; give a YAML file with settings"]
        raw = parse(data.decode("utf-8"))
    except FileNotFoundError:
        return {}, [
            f"{path}: there is no such file; give the path of a YAML file, `ls configs` shows those that come along"
        ]
    except OSError as error:
        return {}, [f"{path}: cannot be read ({error.strerror or error}); give a YAML file"]
    except UnicodeDecodeError as error:
        return {}, [f"{path}: cannot be read ({error}); give a YAML file"]
    except yaml.YAMLError as error:
        return {}, [f"{path}: is not YAML ({problem_of(error)}); mend that line"]
    except UNFIT as error:
        return {}, [f"{path}: is not YAML, or its path none ({problem_of(error)}); give a YAML file"]
    if raw is None:
        return {}, []
    if not isinstance(raw, dict):
        return {}, [f"{path}: holds a {type(raw).__name__} where sections are needed, such as `run:`"]
    return raw, []


def problem_of(error: Exception) -> str:
    """Returns description and position of a YAML error, without the faulty text, which may hold part of a secret."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        return f"{error.problem or error.context}{where}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is known'}"


def parse(text: str) -> Any:
    """Returns the value of a YAML text, with keys as text, and aliases expanded to separate sections.

    Raises:
        yaml.YAMLError, ValueError and the others in `UNFIT`: the text is not YAML, or exceeds a limit.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES // 1024} KiB of text")
    return _plain(yaml.load(text, Loader=_Loader))


def _plain(value: Any) -> Any:
    """Copies a YAML value with keys as text, so that two aliases of one anchor become two separate sections."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], *, default_kinds: dict[str, str]) -> list[str]:
    """Applies dotted assignments to `raw` in place, those of `kind` first; returns the mistakes in the assignments."""
    mistakes = []
    parsed = []
    for text in overrides:
        name, equals, value = text.partition("=")
        parts = name.split(".")
        if not equals or not all(parts) or len(parts) > MAX_DEPTH or unprintable(name):
            mistakes.append(f"{shown(text)}: is no override; write section.key=value, such as run.images=10M")
            continue
        try:
            parsed.append((parts, parse(value)))
        except UNFIT:
            mistakes.append(f"{shown(text)}: the value is not YAML, or names a key twice; put text in quotes")
    for parts, value in sorted(parsed, key=lambda item: item[0][-1] != "kind"):
        place = raw
        for part in parts[:-1]:
            inner = place.get(part)
            if not isinstance(inner, dict):
                inner = place[part] = {}
            place = inner
        section = ".".join(parts[:-1])
        if parts[-1] == "kind" and section in default_kinds and place.get("kind", default_kinds[section]) != value:
            place.clear()
        place[parts[-1]] = value
    return mistakes
