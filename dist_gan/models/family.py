"""Description of a family of networks: the class of its settings, its two builders, and whether its logits mix images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from pydantic import Field
from torch import nn

from dist_gan.config.values import Count, Section


class NetworkSettings(Protocol):
    """Settings that the networks of all families have."""

    @property
    def kind(self) -> str:
        """Name of the family of networks."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes of class-conditional networks; 0 for unconditional networks."""
        ...

    @property
    def latent_dim(self) -> int:
        """Length of the latent vector that the generator receives."""
        ...

    def model_dump(self, *, mode: Literal["json"]) -> dict[str, Any]:
        """Returns the settings by name, as JSON values."""
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


class BatchDependence(NamedTuple):
    """Setting that makes the discriminator's logit of one image depend on the other images of the batch, as batch
    normalisation does."""

    setting: str
    """Name of the setting in the section `networks`."""
    instead: str
    """Value of the setting with which the logit of each image depends on that image alone."""


S = TypeVar("S", bound=NetworkSettings)


def _mixes_nothing(section: NetworkSettings) -> None:
    """Returns None: the default of `Family.batch_dependence`, for discriminators whose logit depends on one image alone."""


@dataclass(frozen=True)
class Family(Generic[S]):
    """One family of networks: the class of its settings, and the functions that build its networks.

    Builders draw weights from torch's global random generator. A generator maps (latents_BZ, labels_B) to images_BCHW
    in [-1, 1], or to points_B2, and has the attribute `latent_dim`; a discriminator maps (images, labels_B) to
    logits_B.
    """

    settings: type[S]
    """Class of the section `networks`; a subclass of `PictureNetworks` if the networks are for images."""
    build_generator: Callable[[S], nn.Module]
    build_discriminator: Callable[[S], nn.Module]
    batch_dependence: Callable[[S], BatchDependence | None] = _mixes_nothing
    """Function that returns the setting by which a logit depends on several images of its batch, or None without one."""

    @property
    def makes(self) -> Literal["images", "points"]:
        """Kind of data that the generator makes: `images` or `points`."""
        return "images" if issubclass(self.settings, PictureNetworks) else "points"
