"""A rank's share of a checkpoint: the tensors that it writes, the job of writing them, and the hash of the file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch

from dist_gan.runtime import Fingerprints
from dist_gan.types import Scalars, TensorFacts


class CommittedCheckpoint(NamedTuple):
    """A checkpoint that has been committed."""

    url: str
    images: int
    blocked_s: float
    """Seconds for which training was blocked by it."""
    durable_s: float
    """Seconds from the moment of saving to the commit."""


class WriteJob(NamedTuple):
    """State of a run at one moment, to be written as a checkpoint by the background thread."""

    url: str
    images: int
    file: str
    values: str
    """JSON state of all parts at the moment of saving."""
    scalars: Scalars
    fingerprints: Fingerprints
    ready: torch.cuda.Event | None
    """CUDA event that is reached once the copies from the GPU are complete; None on a CPU."""
    began: float
    blocked_s: float


class BackgroundHash:
    """sha256 of a buffer, computed in a thread of its own while the buffer is being written."""

    def __init__(self, data: memoryview) -> None:
        self._hash = hashlib.sha256()
        self._thread = threading.Thread(target=self._hash.update, args=(data,), name="checkpoint hash", daemon=True)
        self._thread.start()

    def result(self) -> str:
        """The hash in hex; waits until it is computed."""
        self._thread.join()
        return self._hash.hexdigest()


def deal(tensors: Mapping[str, TensorFacts], ranks: int) -> list[list[str]]:
    """Names of the tensors that each rank writes. The largest come first, each to the rank with the fewest bytes so far."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    num_bytes = [0] * ranks
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = num_bytes.index(min(num_bytes))
        shares[rank].append(name)
        num_bytes[rank] += tensors[name].nbytes
    return shares
