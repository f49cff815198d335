"""A metric: a function of the averaged generator's samples that all ranks call together at an interval of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dist_gan.draws import Draws
from dist_gan.evaluate import sample
from dist_gan.runtime import Runtime
from dist_gan.types import Scalars, UserError

BATCH = 250
"""Samples that a rank generates at a time."""
_ROUNDING = 1e-3
"""Largest relative difference between two ranks' values that counts as rounding; different processors may cause it."""


@dataclass(frozen=True)
class Samples:
    """Source of a metric's samples: the averaged generator with this rank's share of the latents.

    Every method is collective: all ranks call it with the same arguments, in the same order.
    """

    generator: nn.Module
    """The averaged generator, in evaluation mode, whole on every rank: `generator(latents_BZ, labels_B) -> images_BCHW`."""
    draws: Draws
    """Random numbers of the run."""
    runtime: Runtime
    """This process and its process groups."""
    classes: int
    """Classes that the generator is conditioned on; 0 for none."""
    images: int
    """Real images that the discriminator has seen so far."""

    def generated(self, count: int, *, purpose: str = "metrics") -> Iterator[Tensor]:
        """Yields this rank's share of `count` samples, in batches on its device; the latents are the same at every
        call.

        Rank r of w ranks makes the samples r, r + w, r + 2w and so on. Sample i of a conditional generator has class i
        % classes.

        Args:
            count: number of samples over all ranks.
            purpose: name of the latents; another name gives other latents.
        """
        ranks = self.runtime.world_size
        mine = torch.arange(self.runtime.rank, count, ranks)
        for start in range(0, -(-count // ranks), BATCH):  # equally many landmarks on every rank
            self.runtime.mark("samples for a metric")
            slots = mine[start : start + BATCH]
            if len(slots):
                yield from sample(self.generator, self.draws, slots=slots, classes=self.classes, purpose=purpose)

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of `values`, a tensor of any shape, over all ranks, on the CPU."""
        return self.runtime.control_group.sum(values.detach().cpu().clone())

    def gather(self, rows: Tensor, *, count: int) -> Tensor:
        """Returns the rows of all `count` samples, in the order of the samples, on every rank.

        Args:
            rows: one row for each sample of this rank's share, in the order of `generated`.
            count: number of samples over all ranks.
        """
        most = -(-count // self.runtime.world_size)
        padding = [0, 0] * (rows.dim() - 1) + [0, most - len(rows)]
        return self.runtime.training_group.gather_rows(pad(rows, padding))[:count]


def _plainly(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


class Metric(NamedTuple):
    """A named measure of the averaged generator."""

    name: str
    """Name of the metric, for messages."""
    every: int
    """Interval, in images, between two measurements; the metric is also measured when the run ends."""
    measure: Callable[[Samples], Mapping[str, float]]
    """Function that returns numbers by name, logged as `metric/<name>`; all ranks call it and must get the same
    numbers.
    """
    describe: Callable[[Mapping[str, float]], str] = _plainly
    """Function that describes the values in one sentence for the terminal."""


@torch.no_grad()
def measure(metric: Metric, samples: Samples) -> Scalars:
    """Measures a metric; returns its values, which are the same on every rank. Collective.

    torch's generators are seeded before, so that a generator with noise inputs gives the same values after a restart.

    Raises:
        UserError: the metric returns something other than numbers by name, or the ranks return different values.
    """
    runtime = samples.runtime
    runtime.mark(f"the metric {metric.name}")
    runtime.seed(samples.draws.seed_for(f"metric/{metric.name}", draw=samples.images, rank=runtime.rank))
    found = metric.measure(samples)
    try:
        values = {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"the metric {metric.name!r} returns {type(found).__name__} where numbers by name are needed; return a dict "
            f"such as {{'{metric.name}': 0.5}}"
        ) from error
    everywhere = runtime.control_group.gather_json(values)
    for rank, theirs in enumerate(everywhere):
        if theirs.keys() != values.keys() or not all(_alike(theirs[name], everywhere[0][name]) for name in theirs):
            raise UserError(
                f"the metric {metric.name!r} has other values on rank {rank} ({_plainly(theirs)}) than on rank 0 "
                f"({_plainly(everywhere[0])}); combine the ranks' shares with samples.sum or samples.gather"
            )
    first: Scalars = everywhere[0]
    return first


def _alike(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_ROUNDING) or (math.isnan(a) and math.isnan(b))
