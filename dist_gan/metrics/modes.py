"""Mode count on the embedded data set, whose modes are known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dist_gan.embedded.judge import judge, mode_report
from dist_gan.embedded.shapes import CLASS_NAMES
from dist_gan.evaluate import to_pictures
from dist_gan.metrics.metric import Metric, Samples

MODE_SAMPLES = 5_000
"""Default number of samples, over all ranks, among which the modes are counted."""


def mode_count(*, every: int, samples: int = MODE_SAMPLES) -> Metric:
    """Returns a metric that counts the modes of the embedded data set among samples; `mode_report` documents its
    values.

    Args:
        every: interval between two measurements, in images.
        samples: number of samples over all ranks.
    """

    def count(source: Samples) -> dict[str, float | int]:
        counts = np.zeros(1 + len(CLASS_NAMES), dtype=np.int64)
        for part in source.generated(samples, purpose="modes"):
            counts += np.bincount(judge(to_pictures(part)) + 1, minlength=len(counts))
        total = source.sum(torch.from_numpy(counts)).numpy()
        return mode_report(np.repeat(np.arange(-1, len(CLASS_NAMES)), total))

    def describe(values: Mapping[str, float]) -> str:
        return (
            f"modes: {values['modes_covered']:.0f} of {values['modes_total']:.0f} covered, the rarest at "
            f"{100 * values['smallest_share']:.0f}% of its fair share; {100 * values['valid_fraction']:.1f}% of "
            f"{samples:,} samples are valid"
        )

    return Metric("modes", every, count, describe)
