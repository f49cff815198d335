"""State of a run: every part that a checkpoint stores, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_gan.checkpoint.schema import check_progress, check_stream
from dist_gan.data import Stream
from dist_gan.ema import GeneratorEMA
from dist_gan.health.recovery import Recovery
from dist_gan.records import Record
from dist_gan.runtime import Player
from dist_gan.types import Part, TensorFacts, check_table, facts_of

MAY_BEGIN_ANEW = ("objective", "recovery")
"""Parts that a checkpoint may lack, because an earlier version did not write them; the run begins them anew."""


@dataclass
class Progress:
    """Counters of a run."""

    images: int = 0
    """Real images shown to the discriminator, over all ranks."""
    d_updates: int = 0
    """Number of discriminator updates, skipped ones included; it determines which updates have lazy penalties."""
    g_updates: int = 0
    """Generator updates, skipped ones included."""
    averaged_images: int = 0
    """Number of images seen at the last update of the averaged generator."""
    seconds: float = 0.0
    """Time spent training, over all attempts."""

    def values(self) -> dict[str, Any]:
        """Returns the counters by name."""
        return {
            "images": self.images, "d_updates": self.d_updates, "g_updates": self.g_updates,
            "averaged_images": self.averaged_images, "seconds": self.seconds,
        }  # fmt: skip

    def load_values(self, values: dict[str, Any]) -> None:
        """Restores a state from `values`.

        Raises:
            ValueError: a value has another type or range.
        """
        check_progress(Record(values, place="progress"))
        self.images, self.averaged_images = values["images"], values["averaged_images"]
        self.d_updates, self.g_updates = values["d_updates"], values["g_updates"]
        self.seconds = float(values["seconds"])


class MemoryState:
    """Checkpointed state of an objective's memory.

    Args:
        memory: the memory, whose tensors are read and written in place.
    """

    def __init__(self, memory: Mapping[str, Tensor]) -> None:
        self._memory = memory

    def table(self) -> dict[str, TensorFacts]:
        """Returns the shapes and dtypes of the memory's tensors, by name."""
        return {name: facts_of(tensor) for name, tensor in self._memory.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the memory's tensors by name."""
        return iter(self._memory.items())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a state from `tensors`.

        Raises:
            ValueError: the tensors are those of another objective.
        """
        check_table("the objective's memory", tensors, self.table())
        for name, tensor in tensors.items():
            self._memory[name].copy_(tensor)


class StreamState:
    """Checkpointed state of a stream: its position in the data order, which is checked before it is loaded."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def values(self) -> dict[str, Any]:
        """Returns the number of batches consumed, the fingerprint of the order, and the damaged images found."""
        return self._stream.values()

    def load_values(self, values: dict[str, Any]) -> None:
        """Restores a state from `values`.

        Raises:
            ValueError: a value has another type or range.
            UserError: the data are not those of the checkpoint.
        """
        check_stream(Record(values, place="the place in the data"))
        self._stream.load_values({"damaged": []} | values)  # the earliest checkpoints lack this entry


@dataclass
class TrainState:
    """Every part of a run that survives a restart. The keys of `parts` are names in the checkpoint's format."""

    generator: Player
    discriminator: Player
    ema: GeneratorEMA
    memory: dict[str, Tensor]
    """Small tensors that the objective keeps from update to update."""
    stream: Stream
    progress: Progress
    recovery: Recovery

    def parts(self) -> dict[str, Part]:
        """Returns the parts that a checkpoint stores, by name."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "objective": MemoryState(self.memory),
            "stream": StreamState(self.stream),
            "progress": self.progress,
            "recovery": self.recovery,
        }
