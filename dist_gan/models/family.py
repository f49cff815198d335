"""A family of networks as one value: the class of its settings, its two builders, and what its discriminator mixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from pydantic import Field
from torch import nn

from dist_gan.config.values import Count, Section


class NetworkSettings(Protocol):
    """What the settings of all families have in common."""

    @property
    def kind(self) -> str:
        """Name of the family."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes to condition on; 0 for none."""
        ...

    @property
    def latent_dim(self) -> int:
        """Length of a latent."""
        ...

    def model_dump(self, *, mode: Literal["json"]) -> dict[str, Any]:
        """The settings by name, as JSON values."""
        ...


class PictureNetworks(Section):
    """Settings that all networks for images have in common."""

    kind: str
    resolution: int
    """Width and height of the images, in pixels."""
    channels: Literal[1, 3] = 3
    """Number of colour channels of the images: 1 for grey images, 3 for RGB images."""
    classes: Annotated[Count, Field(ge=0, le=100_000)] = 0
    """Number of classes of class-conditional networks; 0 makes the networks unconditional."""
    latent_dim: Annotated[Count, Field(ge=1, le=2**16)] = 100
    """Length of the latent vector that the generator receives."""


class Mixture(NamedTuple):
    """The setting by which a discriminator's logit of one image depends on other images of its batch."""

    setting: str
    """Name of the setting in the section `networks`."""
    instead: str
    """Value of the setting with which every logit depends on its own image alone."""


S = TypeVar("S", bound=NetworkSettings)


def _mixes_nothing(section: NetworkSettings) -> None:
    """The answer of a family whose discriminator looks at each image alone."""


@dataclass(frozen=True)
class Family(Generic[S]):
    """One kind of networks.

    Builders take weights from torch's global generator. A generator maps (latents_BZ, labels_B) to images_BCHW in
    [-1, 1], or to points_B2, and has the attribute `latent_dim`; a discriminator maps (images, labels_B) to logits_B.
    """

    settings: type[S]
    """Class of the section `networks`; a subclass of `PictureNetworks` if the networks are for images."""
    build_generator: Callable[[S], nn.Module]
    build_discriminator: Callable[[S], nn.Module]
    mixture: Callable[[S], Mixture | None] = _mixes_nothing
    """The setting by which the discriminator mixes the images of a batch; None if it does not with these settings."""

    @property
    def makes(self) -> Literal["images", "points"]:
        """What the generator makes."""
        return "images" if issubclass(self.settings, PictureNetworks) else "points"
