"""Reads real images for training: the manifest of shards, the order of images, decoding, and the stream of batches."""

from dist_gan.data.decoding import Damage, Stage
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.points import PointStream
from dist_gan.data.stream import ImageStream
from dist_gan.data.stream_interface import Stream

__all__ = ["Damage", "ImageStream", "PointStream", "ShardFolder", "Stage", "Stream"]
