"""Metrics of the averaged generator, measured on all ranks while a run trains."""

from dist_gan.metrics.metric import Metric, Samples, measure

__all__ = ["Metric", "Samples", "measure"]
