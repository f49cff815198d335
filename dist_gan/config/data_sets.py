"""Settings of each kind of data set, and the facts that the rules of a configuration need about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dist_gan.config.values import Count, Place, PlaceOrNone, Real, Section, each_folder_once

Made = Literal["images", "points"]


class DataSection(Section):
    """Settings of any data set."""

    makes: ClassVar[Made]
    """Kind of samples in a batch: `images` or `points`."""
    if TYPE_CHECKING:  # each class declares it at its own place in the order of `--help`
        kind: str

    @property
    def sources(self) -> dict[str, int]:
        """Mixing weight of each folder of shards that the user has named, by URL."""
        return {}

    @property
    def num_drawn(self) -> int:
        """Number of images that the program draws itself before it trains; 0 for data sets that need no drawing."""
        return 0

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if only the manifest of the shards has this number."""
        return None


class DataOrder(DataSection):
    """Settings shared by all image data sets."""

    makes: ClassVar[Made] = "images"
    holdout: Annotated[Real, Field(ge=0, le=0.5)] = 0.0
    """Fraction of the images held out from training. A hash of the image's key decides which images are held out."""
    flip: bool = False
    """Random horizontal flip: each image is mirrored left to right with probability 1/2."""
    lanes: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Number of parallel lanes that the order of images is cut into; a batch takes its images from all lanes in turn.

    More lanes mix the images of a batch better. Every process needs at least one lane.
    """
    block: Annotated[Count, Field(ge=1, le=2**16)] = 64
    """Number of neighbouring images of a shard that are read in one request and shuffled among each other."""
    balance: bool = False
    """Class balancing: every class is drawn equally often, whatever its size. False draws every image equally often."""
    prefetch: Annotated[Count, Field(ge=1, le=64)] = 4
    """Number of batches that are decoded in advance, while the networks train."""
    workers: Annotated[Count, Field(ge=1, le=256)] = 2
    """Number of threads per process that decode images."""
    memory: Annotated[Count, Field(ge=2**20, le=2**42)] = 2**29
    """Memory limit, in bytes per process, for undecoded images.

    If the blocks of all lanes do not fit into it, images are read one by one instead of in blocks.
    """
    cache: Annotated[Count, Field(ge=0, le=2**42)] = 2**28
    """Memory limit, in bytes per process, for decoded images.

    A data set that fits into it is decoded once and then kept; a larger one is decoded in every pass.
    """
    bad_images: Literal["substitute", "fail"] = "substitute"
    """Reaction to a damaged image: `substitute` uses the next sound image of the same shard, `fail` ends the run."""
    max_bad: Annotated[Real, Field(ge=0, le=1)] = 1e-3
    """Largest fraction of the images that may be damaged and substituted; with more, the run ends.

    One damaged image is always allowed.
    """


class ShapesData(DataOrder):
    """The embedded data set, which the program draws itself: images of 32x32 pixels with 4 shapes in 3 colours."""

    kind: Literal["shapes"] = "shapes"
    """Name of this kind of data: images of shapes that the program draws itself."""
    count: Annotated[Count, Field(ge=12, le=10**6)] = 24_000
    """Number of images that the program draws."""

    @property
    def num_drawn(self) -> int:
        """Number of images that the program draws itself."""
        return self.count

    @property
    def num_classes(self) -> int:
        """Number of classes: 4 shapes in each of 3 colours."""
        return 12


class ShardsData(DataOrder):
    """WebDataset shards with a manifest, as written by `dist-gan pack` or `dist-gan index`."""

    kind: Literal["shards"] = "shards"
    """Name of this kind of data: images from WebDataset shards."""
    url: Place
    """Folder that holds the shards and their manifest: a local path, or a URL such as s3://bucket/folder."""
    weight: Annotated[Count, Field(ge=1, le=10_000)] = 1
    """Mixing weight of the folder `data.url`, relative to the weights of the folders in `data.mix`."""
    mix: Annotated[
        dict[Place, Annotated[Count, Field(ge=1, le=10_000)]],
        Field(default_factory=dict, max_length=10_000),
        BeforeValidator(each_folder_once),
    ]
    """Further shard folders, each with an integer mixing weight; `data.weight` is the weight of `data.url`.

    With `data.weight: 3` and one further folder of weight 1, every 4 consecutive images hold exactly 3 from `data.url`
    and 1 from the further folder.
    """
    patience_s: Annotated[Count, Field(ge=1, le=3600)] = 120
    """Time, in seconds, for which requests to a store that does not answer are repeated before the run ends."""
    disk_cache: PlaceOrNone = ""
    """Local folder that caches the data read from the store, for all processes of a machine and for later runs.

    An empty text turns the cache off.
    """
    disk_cache_bytes: Annotated[Count, Field(ge=2**20)] = 2**36
    """Size limit of the folder `data.disk_cache`, in bytes. The least recently used entries are deleted first."""

    @property
    def sources(self) -> dict[str, int]:
        """Mixing weight of each folder of shards, by URL."""
        return {self.url: self.weight} | self.mix


class PointsData(DataSection):
    """Points in the plane from a ring of Gaussians, for studies of GAN dynamics without images."""

    makes: ClassVar[Made] = "points"
    kind: Literal["points"] = "points"
    """Name of this kind of data: random points, computed in memory from the run's seed."""
    modes: Annotated[Count, Field(ge=1, le=10_000)] = 8
    """Number of Gaussians, spaced evenly on a circle."""
    radius: Annotated[Real, Field(gt=0)] = 0.7
    """Radius of the circle on which the Gaussians lie; the circle is centred at 0."""
    sigma: Annotated[Real, Field(gt=0)] = 0.02
    """Standard deviation, in both coordinates, of each of the Gaussians in the plane that the points are drawn from."""

    @property
    def num_classes(self) -> int:
        """Number of Gaussians; the class of a point is the number of the Gaussian that it is drawn from."""
        return self.modes


DATA_SETS: dict[str, type[DataSection]] = {
    "shapes": ShapesData,
    "shards": ShardsData,
    "points": PointsData,
}
"""Class of the settings of each kind of data set, by the name of the kind (`data.kind`)."""
