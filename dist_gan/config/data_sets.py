"""Data sets: the class of settings of each kind, with what the rules of a configuration ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dist_gan.config.values import Count, Place, PlaceOrNone, Real, Section, each_folder_once

Made = Literal["images", "points"]


class DataSection(Section):
    """Settings of any data set."""

    makes: ClassVar[Made]
    """What a batch holds: images or points."""
    if TYPE_CHECKING:  # each class declares it at its own place in the order of `--help`
        kind: str

    @property
    def sources(self) -> dict[str, int]:
        """Weight of each folder of shards that the user has named."""
        return {}

    @property
    def num_drawn(self) -> int:
        """Number of images that the program draws itself before it trains; 0 for data that need no drawing."""
        return 0

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if a manifest tells it."""
        return None


class DataOrder(DataSection):
    """Settings shared by all image data sets."""

    makes: ClassVar[Made] = "images"
    holdout: Annotated[Real, Field(ge=0, le=0.5)] = 0.0
    """Share of the images held out from training, chosen by a hash of the key."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    lanes: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Number of logical readers that the sample order is divided among; at least one per process."""
    block: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Number of neighbouring images of a shard that are read in one request and shuffled together."""
    balance: bool = False
    """Draw every class equally often, however many images it has."""
    prefetch: Annotated[Count, Field(ge=1, le=64)] = 4
    """Number of batches decoded ahead of training."""
    workers: Annotated[Count, Field(ge=1, le=256)] = 2
    """Number of decoding threads per process."""
    memory: Annotated[Count, Field(ge=2**20, le=2**42)] = 2**29
    """Limit for undecoded images per process, in bytes; if the lanes' blocks exceed it, images are read singly."""
    cache: Annotated[Count, Field(ge=0, le=2**42)] = 2**28
    """Limit for decoded images per process, in bytes; a data set that fits is decoded once, else on every pass."""
    bad_images: Literal["substitute", "fail"] = "substitute"
    """Reaction to a damaged image: substitute the next sound one of its shard, or end the run."""
    max_bad: Annotated[Real, Field(ge=0, le=1)] = 1e-3
    """Share of damaged images that may be substituted before the run ends; one is always allowed."""


class ShapesData(DataOrder):
    """Images drawn by the program itself: 4 shapes in 3 colours, 32x32."""

    kind: Literal["shapes"] = "shapes"
    """The embedded data set."""
    count: Annotated[Count, Field(ge=12, le=10**6)] = 24_000
    """Number of images drawn."""

    @property
    def num_drawn(self) -> int:
        """Number of images that the program draws itself."""
        return self.count

    @property
    def num_classes(self) -> int:
        """Number of the shapes in each colour."""
        return 12


class ShardsData(DataOrder):
    """WebDataset shards with a manifest, as written by `dist-gan pack` or `dist-gan index`."""

    kind: Literal["shards"] = "shards"
    """Images from WebDataset shards."""
    url: Place
    """Folder of the shards: a path, or a URL of an allowed scheme."""
    weight: Annotated[Count, Field(ge=1, le=10_000)] = 1
    """Mixing weight of the shards at `url`, relative to those in `mix`."""
    mix: Annotated[
        dict[Place, Annotated[Count, Field(ge=1, le=10_000)]],
        Field(default_factory=dict, max_length=10_000),
        BeforeValidator(each_folder_once),
    ]
    """Further shard folders and their weights; of every (sum of all weights) images, each gives exactly its weight."""
    patience_s: Annotated[Count, Field(ge=1, le=3600)] = 120
    """Time limit, in seconds, for a store that does not answer; then the run ends."""
    disk_cache: PlaceOrNone = ""
    """Local folder that caches reads from the store, shared by all processes of a machine; empty for no cache."""
    disk_cache_bytes: Annotated[Count, Field(ge=2**20)] = 2**36
    """Size limit of `disk_cache`, in bytes; the least recently used entries are deleted first."""

    @property
    def sources(self) -> dict[str, int]:
        """Weight of each folder of shards."""
        return {self.url: self.weight} | self.mix


class PointsData(DataSection):
    """Points in the plane from a ring of Gaussians, for studies of GAN dynamics without images."""

    makes: ClassVar[Made] = "points"
    kind: Literal["points"] = "points"
    """Points generated in memory, a function of seed, draw and slot."""
    modes: Annotated[Count, Field(ge=1, le=10_000)] = 8
    """Number of Gaussians on the circle."""
    radius: Annotated[Real, Field(gt=0)] = 0.7
    """Radius of the circle; points lie in [-1, 1]."""
    sigma: Annotated[Real, Field(gt=0)] = 0.02
    """Standard deviation of each Gaussian."""

    @property
    def num_classes(self) -> int:
        """Number of Gaussians; the class of a point is the number of its own."""
        return self.modes


DATA_SETS: dict[str, type[DataSection]] = {
    "shapes": ShapesData,
    "shards": ShardsData,
    "points": PointsData,
}
"""Every kind of data set by its name, `data.kind`."""
