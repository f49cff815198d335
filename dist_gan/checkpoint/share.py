"""One rank's share of a checkpoint: the tensors that the rank writes, the job of writing, and the hash of the file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch

from dist_gan.runtime import Fingerprints
from dist_gan.types import Scalars, TensorFacts


class CommittedCheckpoint(NamedTuple):
    """Facts about a checkpoint that has been committed: its URL, images seen, and durations."""

    url: str
    images: int
    blocked_s: float
    """Seconds for which saving the checkpoint blocked training."""
    durable_s: float
    """Seconds from the start of saving to the commit."""


class WriteJob(NamedTuple):
    """State of a run at one moment, which a background thread is to write as a checkpoint."""

    url: str
    images: int
    file: str
    values: str
    """JSON text of the states of all parts of the run at the moment of saving."""
    scalars: Scalars
    fingerprints: Fingerprints
    ready: torch.cuda.Event | None
    """CUDA event that is reached once the copies from the GPU are complete; None on a CPU."""
    began: float
    blocked_s: float


class BackgroundHash:
    """Computes the sha256 of a buffer in a thread of its own, while the buffer is being written."""

    def __init__(self, data: memoryview) -> None:
        self._hash = hashlib.sha256()
        self._thread = threading.Thread(target=self._hash.update, args=(data,), name="checkpoint hash", daemon=True)
        self._thread.start()

    def result(self) -> str:
        """Waits until the hash is computed, and returns it in hex."""
        self._thread.join()
        return self._hash.hexdigest()


def deal(tensors: Mapping[str, TensorFacts], ranks: int) -> list[list[str]]:
    """Returns the names of the tensors that each rank writes, so that all ranks write about equally many bytes.

    The tensors are dealt from the largest to the smallest, each to the rank that has the fewest bytes so far.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    num_bytes = [0] * ranks
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = num_bytes.index(min(num_bytes))
        shares[rank].append(name)
        num_bytes[rank] += tensors[name].nbytes
    return shares
