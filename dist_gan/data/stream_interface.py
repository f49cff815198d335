"""Interface that the training loop uses for any stream of real samples, images or points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from dist_gan.data.decoding import Damage
from dist_gan.types import Batch


class Stream(Protocol):
    """Endless stream of batches of real samples; the samples of a batch depend on the seed and the batch's number
    alone."""

    draw: int
    """Number of the next global batch, counted from 0."""
    waited_s: float
    """Seconds for which training has waited for data so far."""

    @property
    def retries(self) -> int:
        """Number of requests to the store that this rank had to repeat."""
        ...

    @property
    def num_damaged(self) -> int:
        """Number of images known to be damaged, over all ranks."""
        ...

    def next(self) -> Batch:
        """Returns this rank's part of the next global batch, on the device."""
        ...

    def preview(self, count: int) -> Tensor:
        """Returns the first `count` samples of the order, on the device, for the sample grid."""
        ...

    def seek(self, draw: int) -> None:
        """Makes global batch number `draw` the next batch."""
        ...

    def close(self) -> None:
        """Ends the threads that prefetch batches."""
        ...

    def damaged(self) -> list[Damage]:
        """Returns the images that this rank has found damaged since the last call."""
        ...

    def note_damaged(self, found: Iterable[Damage]) -> list[Damage]:
        """Counts the damaged images that all ranks have found; returns, on all ranks, those not counted before.

        Raises:
            TrainingFailed: more images are damaged than may be substituted.
        """
        ...

    def values(self) -> dict[str, Any]:
        """Returns the number of batches consumed and the fingerprint of the order, for the checkpoint."""
        ...

    def load_values(self, values: dict[str, Any]) -> None:
        """Continues from the state that `values` returned."""
        ...
