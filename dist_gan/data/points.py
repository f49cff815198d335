"""Points in the plane from a ring of Gaussians: a computed data set for studies of GAN dynamics without images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dist_gan.config import PointsData
from dist_gan.data.decoding import Damage
from dist_gan.draws import Draws
from dist_gan.types import Batch, UserError


class PointStream:
    """Endless batches of points; the label of a point is the number of its Gaussian.

    Each point is a function of the seed, the number of the batch (`draw`) and the index in the global batch (slot).
    """

    def __init__(self, section: PointsData, *, classes: int, slots: Tensor, draws: Draws) -> None:
        self.draw = 0
        self.waited_s = 0.0
        self.retries = self.num_damaged = 0
        self.fingerprint = f"points/{section.modes}/{section.radius}/{section.sigma}/seed={draws.seed}"
        self._section, self._labelled, self._slots, self._draws = section, classes > 0, slots, draws

    def next(self) -> Batch:
        """Returns this rank's part of the next global batch, on the device."""
        points, labels = self._points(self.draw, self._slots)
        keys = tuple(f"point-{self.draw}-{slot}" for slot in self._slots.tolist())
        self.draw += 1
        return Batch(points, labels if self._labelled else None, self._slots, keys, self.draw - 1)

    def preview(self, count: int) -> Tensor:
        """Returns the first `count` points of global batch 0, on the device."""
        return self._points(0, torch.arange(count))[0]

    def _points(self, draw: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        address: dict[str, Any] = {"draw": draw, "slots": slots}
        labels = self._draws.integers("points/mode", below=self._section.modes, **address)
        angle = labels.to(self._draws.dtype) * (2.0 * math.pi / self._section.modes)
        centre = torch.stack((angle.cos(), angle.sin()), dim=1) * self._section.radius
        return centre + self._section.sigma * self._draws.normal("points/offset", shape=(2,), **address), labels

    def seek(self, draw: int) -> None:
        """Makes global batch number `draw` the next batch."""
        self.draw = draw

    def close(self) -> None:
        """Does nothing, since no threads prefetch."""

    def damaged(self) -> list[Damage]:
        """Returns an empty list, since points are computed and not read."""
        return []

    def note_damaged(self, found: Iterable[Damage]) -> list[Damage]:
        """Returns an empty list, since computed points cannot be damaged."""
        return []

    def values(self) -> dict[str, Any]:
        """Returns the number of batches consumed and the fingerprint of the data, for the checkpoint."""
        return {"draw": self.draw, "fingerprint": self.fingerprint}

    def load_values(self, values: dict[str, Any]) -> None:
        """Continues from the state that `values` returned.

        Raises:
            UserError: the state is that of other points.
        """
        if values["fingerprint"] != self.fingerprint:
            raise UserError("data: the points are not those of the checkpoint; give the same data, or another run.dir")
        self.seek(int(values["draw"]))
