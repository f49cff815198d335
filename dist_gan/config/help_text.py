"""Help text of the configuration: every setting with its default and its description."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from dist_gan.config.kinds import classes_of
from dist_gan.config.sections import RunConfig


def schema_help() -> str:
    """Returns the help text: every section and setting with its default and docstring."""
    lines: list[str] = []
    for name in RunConfig.model_fields:
        sections = classes_of(name)
        for section in sections:
            kind = section.model_fields.get("kind")
            choice = f" (kind: {kind.default})" if kind and len(sections) > 1 else ""
            lines += ["", f"{name}{choice}: {' '.join((section.__doc__ or '').split())}"]
            for field_name, field in section.model_fields.items():
                default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
                lines.append(f"  {name}.{field_name} = {default}")
                lines.append(f"      {' '.join((field.description or '').split())}{_choices(field.annotation)}")
    lines += [
        "",
        "A setting that may move is a number or a ramp, written as {start: 2e-3, end: 0, images: 300k, shape: linear}.",
    ]
    return "\n".join(lines).lstrip("\n")


def _choices(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f" One of: {', '.join(str(a) for a in get_args(annotation))}."
    return ""
