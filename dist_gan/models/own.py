"""Networks built by the user's own script: their settings in the recipe, and the check of the returned networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, JsonValue
from torch import nn

from dist_gan.config.values import Count
from dist_gan.models.family import Family, PictureNetworks
from dist_gan.types import Networks, UserError


class OwnNetworks(PictureNetworks):
    """Networks that a script of the user's builds, and hands to `dist_gan.train`; docs/extending.md has an example."""

    kind: Literal["own"] = "own"
    """Networks of the user's own script."""
    resolution: Annotated[Count, Field(ge=1, le=2**14)] = 32
    """Pixels a side."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings for the script's function that builds the networks: any names, any values."""


OwnBuilder = Callable[[OwnNetworks], tuple[nn.Module, nn.Module]]
"""Function of the user's script that builds a generator and a discriminator, with torch's global random numbers."""

NEEDS_SCRIPT = (
    "networks.kind: 'own' is built by a script of the user's; start that script, which calls dist_gan.train(..., "
    "networks=...), or choose another kind"
)


def _refuse(section: OwnNetworks) -> NoReturn:
    raise UserError(NEEDS_SCRIPT)


OWN: Family[Any] = Family(OwnNetworks, build_generator=_refuse, build_discriminator=_refuse)


def build_own(builder: OwnBuilder, section: OwnNetworks) -> Networks:
    """Builds both networks by the user's function, and sets the generator's attribute `latent_dim`.

    Raises:
        UserError: the function returned something other than two networks.
    """
    found: Any = builder(section)
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(part, nn.Module) for part in found):
        raise UserError(
            f"networks: {name_of(builder)} returned {type(found).__name__}; let it return (generator, discriminator), two "
            f"torch modules"
        )
    generator, discriminator = found
    if generator is discriminator:
        raise UserError(f"networks: {name_of(builder)} returned one network twice; let it return two")
    generator.latent_dim = section.latent_dim
    return Networks(generator, discriminator)


def name_of(function: Any) -> str:
    """Returns the name of a function or class of the user's script, for messages and records."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def described(script: Any) -> str:
    """Returns name and hash of a recorded script as text for a sentence; the record may come from a file."""
    if not isinstance(script, dict):
        return "no script"
    return f"{script.get('name')!s:.100} (sha256 {script.get('sha256')!s:.12})"
