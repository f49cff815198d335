"""Real images: shards and their manifest, the order, the stream, packing. The only importer of webdataset."""

from dist_gan.data.points import PointStream
from dist_gan.data.stream import ImageStream, Stream

__all__ = ["ImageStream", "PointStream", "Stream"]
