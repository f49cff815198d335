"""Means of scalars for the log: summed on the device, and reduced over the ranks once per tick."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_gan.runtime import Runtime
from dist_gan.types import Scalars


class ScalarMeans:
    """Means of named scalars since the last flush; adding one never waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds one observation of each term, a detached scalar on this rank."""
        for name, term in terms.items():
            if name in self._sums:
                self._sums[name] += term
            else:
                self._sums[name] = term.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def flush(self, runtime: Runtime) -> Scalars:
        """Returns the mean of each term over time and ranks, by one reduction, and resets all means."""
        names = sorted(self._sums)
        if not names:
            return {}
        means = torch.stack([(self._sums[n].double() / self._counts[n]).to(runtime.device) for n in names])
        values = runtime.training_group.mean(means).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))
