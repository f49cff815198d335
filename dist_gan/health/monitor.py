"""Detectors judge the logged scalars; a verdict names a failure of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dist_gan.types import Scalars


class Verdict(NamedTuple):
    """A failure of the training, equal on every rank."""

    phenomenon: str
    """Name of the failure, such as `nonfinite` or `mode_collapse`."""
    reason: str
    """Evidence in one clause, without a full stop."""
    remedy: str
    """Change of settings that may prevent the failure, as an imperative clause."""


Detector = Callable[[int, Scalars], Verdict | None]
"""Function of the images seen and of the scalars just logged, equal on every rank; None if it finds no failure."""


def judge(detectors: Sequence[Detector], images: int, scalars: Scalars) -> Verdict | None:
    """The first verdict in the order of the detectors, all of which see the scalars; None without a failure."""
    verdicts = [detector(images, scalars) for detector in detectors]
    return next((verdict for verdict in verdicts if verdict is not None), None)
