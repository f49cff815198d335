"""Types of the values of settings: numbers with units, paths and URLs, and ramps over the number of images seen."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    model_validator,
)

from dist_gan.urls import is_elsewhere, is_homeless, normal
from dist_gan.wording import scheme_of, unprintable

_NUMBER = re.compile(
    r"([-+]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(k|K|M|G|T|Ki|Mi|Gi)?",
    re.ASCII,
)
_WHOLE = re.compile(r"[-+]?[\d_]{1,40}", re.ASCII)
_UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_number(value: Any) -> Any:
    """Converts texts such as `10M`, `128Ki`, `20k` and `1e-3` to numbers; returns any other value unchanged."""
    if not isinstance(value, str):
        return value
    match = _NUMBER.fullmatch(value.strip())
    if match is None:
        return value
    unit = _UNITS.get(match[2] or "", 1)
    if _WHOLE.fullmatch(match[1]):
        return int(match[1]) * unit
    number = float(match[1]) * unit
    if math.isinf(number):
        return value
    return int(number) if number.is_integer() else number


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number, not a yes or no")
    return parse_number(value)


def _place(value: str) -> str:
    if unprintable(value):
        raise ValueError("a path or URL without signs that do not print")
    if value and not normal(value):
        raise ValueError("a path or URL that names something")
    if is_elsewhere(value):
        raise ValueError("a path of this host, which file:/// with three slashes stands before")
    if is_homeless(value):
        raise ValueError("a path in the home folder of a user who is known here, or one that begins with ./~")
    return normal(value)


def same_folder(url: str) -> str:
    """Returns one text for all spellings of a folder: without a `/` at its end, and without `.` and `..` in a local
    path."""
    found = normal(url)
    return posixpath.normpath(found) if scheme_of(found) == "file" else found.rstrip("/")


def each_folder_once(value: Any) -> Any:
    """Validates the folders of a mixture; raises ValueError if two spellings name the same folder."""
    if isinstance(value, Mapping):
        folders = [same_folder(key) for key in value if isinstance(key, str)]
        if len(set(folders)) < len(folders):
            raise ValueError("folders that differ; two of these are the same one")
    return value


MANY = 10**15
"""Upper limit of settings that are mere counts, such as images; settings that cost memory have lower limits."""
Whole = Annotated[int, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(le=MANY)]
"""Whole number of at most `MANY`; settings for which memory is allocated have lower limits."""
PlaceOrNone = Annotated[str, AfterValidator(_place)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_place)]
"""Non-empty URL or local path; `~` is expanded, and `file://` removed."""
Real = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Base class of all groups of settings: immutable, with unknown keys as errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Choice:
    """Annotation of a field that holds a section of one of several classes; the setting `kind` chooses the class.

    Args:
        sections: class of the section for each kind, in the order in which the kinds are listed.
        default: kind of a section that names no kind.
    """

    def __init__(self, sections: Mapping[str, type[BaseModel]], *, default: str) -> None:
        self.sections = dict(sections)
        self.default = default

    def kind_of(self, value: Any) -> str:
        """Returns the kind that a section, a mapping or an instance, names; the default kind if the section names none."""
        if isinstance(value, Mapping):
            return str(value.get("kind", self.default))
        return str(getattr(value, "kind", self.default))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Returns, for pydantic, the schema of a union of the sections, tagged by kind."""
        tagged = tuple(Annotated[section, Tag(kind)] for kind, section in self.sections.items())
        return handler.generate_schema(Annotated[reduce(or_, tagged), Discriminator(self.kind_of)])


class Ramp(Section):
    """A setting that changes with the number of images seen, from `start` to `end`, and then stays constant."""

    start: Real
    """Value up to `begin` images."""
    end: Real
    """Value from `images` on."""
    images: Annotated[Count, Field(gt=0)]
    """Number of images seen at which `end` is reached."""
    begin: Annotated[Count, Field(ge=0)] = 0
    """Number of images seen at which the value begins to change."""
    shape: Literal["linear", "cosine"] = "linear"
    """Interpolation: a straight line, or half a cosine: end + (start - end) (1 + cos(pi t)) / 2."""

    @model_validator(mode="after")
    def _moves_forward(self) -> Self:
        if self.begin >= self.images:
            raise ValueError(f"a ramp that begins before it ends: begin {self.begin} is not below images {self.images}")
        return self


def _number_or_ramp(value: Any) -> str:
    return "ramp" if isinstance(value, Mapping | Ramp) else "number"


def _within(low: float, below: float) -> AfterValidator:
    """Returns a validator that refuses a number, or either end of a ramp, outside [low, below)."""

    def check(value: Any) -> Any:
        for number in (value.start, value.end) if isinstance(value, Ramp) else (value,):
            if not low <= number < below:
                limit = "" if below == math.inf else f" and below {below:g}"
                raise ValueError(f"from {low:g} on{limit}, at both ends of a ramp too")
        return value

    return AfterValidator(check)


_NumberOrRamp = Annotated[Annotated[Real, Tag("number")] | Annotated[Ramp, Tag("ramp")], Discriminator(_number_or_ramp)]
Knob = Annotated[_NumberOrRamp, _within(0, math.inf)]
"""Number of 0 or more, or a ramp `{start: 2e-3, end: 0, images: 300k, shape: linear}` between such numbers."""
Decay = Annotated[_NumberOrRamp, _within(0, 1)]
"""Number from 0 to below 1, or a ramp between such numbers."""
