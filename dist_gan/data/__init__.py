"""What training reads by: shards and their manifest, the order, the stream."""

from dist_gan.data.decoding import Damage, Stage
from dist_gan.data.pieces import Source
from dist_gan.data.points import PointStream
from dist_gan.data.stream import ImageStream, Stream

__all__ = ["Damage", "ImageStream", "PointStream", "Source", "Stage", "Stream"]
