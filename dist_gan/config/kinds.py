"""Tells which sections of the settings have several kinds, the class of each kind, and the default kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from dist_gan.config.sections import RunConfig
from dist_gan.config.values import Choice


def kinds_of(field: FieldInfo) -> dict[str, Any]:
    """Returns the class of each kind of section that a field may hold, by kind; empty for a field without kinds."""
    for mark in field.metadata:
        if isinstance(mark, Choice):
            return dict(mark.sections)
    return dict(_tagged(field.annotation))


def _tagged(annotation: Any) -> Iterator[tuple[str, Any]]:
    """Yields tag and member of a tagged union; nothing for any other annotation."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        tags = [mark.tag for mark in metadata if isinstance(mark, Tag)]
        if tags:
            yield tags[0], inner
            return
    for part in get_args(annotation):
        yield from _tagged(part)


def classes_of(name: str) -> tuple[type[BaseModel], ...]:
    """Returns the classes that the section `name` may have, each once, in the order in which they are listed."""
    field = RunConfig.model_fields[name]
    return tuple(dict.fromkeys(kinds_of(field).values())) or (field.annotation,)  # type: ignore[return-value]


def default_kinds() -> dict[str, str]:
    """Returns the default kind of each section that has kinds, by name of the section."""
    defaults = {name: field.get_default() for name, field in RunConfig.model_fields.items()}
    return {name: section.kind for name, section in defaults.items() if hasattr(section, "kind")}
