"""What the schema says of the sections: which have kinds, which class a kind has, which kind is the default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from dist_gan.config.sections import RunConfig
from dist_gan.config.values import Choice


def kinds_of(field: FieldInfo) -> dict[str, Any]:
    """Classes of the section that a field holds, by kind; empty for a field that holds no choice of sections."""
    for mark in field.metadata:
        if isinstance(mark, Choice):
            return dict(mark.sections)
    return dict(_tagged(field.annotation))


def _tagged(annotation: Any) -> Iterator[tuple[str, Any]]:
    """Members of a tagged union by tag; none for any other annotation."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        tags = [mark.tag for mark in metadata if isinstance(mark, Tag)]
        if tags:
            yield tags[0], inner
            return
    for part in get_args(annotation):
        yield from _tagged(part)


def classes_of(name: str) -> tuple[type[BaseModel], ...]:
    """Classes that the section `name` may have, each once, in the order in which they are listed."""
    field = RunConfig.model_fields[name]
    return tuple(dict.fromkeys(kinds_of(field).values())) or (field.annotation,)  # type: ignore[return-value]


def default_kinds() -> dict[str, str]:
    """The kind of each section that has kinds, where the user names none."""
    defaults = {name: field.get_default() for name, field in RunConfig.model_fields.items()}
    return {name: section.kind for name, section in defaults.items() if hasattr(section, "kind")}
