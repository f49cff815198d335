"""Detectors, which examine the logged scalars, and verdicts, each of which describes a failure of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dist_gan.types import Scalars


class Verdict(NamedTuple):
    """Description of a failure of the training that was detected; every rank has the same one."""

    phenomenon: str
    """Name of the failure, such as `nonfinite` or `mode_collapse`."""
    reason: str
    """Evidence in one clause, without a full stop."""
    remedy: str
    """Change of settings that may prevent the failure, as an imperative clause."""


Detector = Callable[[int, Scalars], Verdict | None]
"""Function of the number of images seen and the latest logged scalars (equal on all ranks); returns None without
failure.
"""


def judge(detectors: Sequence[Detector], images: int, scalars: Scalars) -> Verdict | None:
    """Calls every detector with the scalars; returns the first verdict in their order, or None if none found a failure."""
    verdicts = [detector(images, scalars) for detector in detectors]
    return next((verdict for verdict in verdicts if verdict is not None), None)
