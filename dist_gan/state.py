"""All that must survive a restart, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dist_gan.checkpoint.schema import check_progress, check_stream
from dist_gan.data import Stream
from dist_gan.ema import GeneratorEMA
from dist_gan.health.recovery import Recovery
from dist_gan.records import Record
from dist_gan.runtime import Player
from dist_gan.types import Stateful, TensorFacts, check_table, facts_of


@dataclass
class Progress:
    """Progress of the run, and the running statistics of its objective."""

    images: int = 0
    """Real images shown to the discriminator, over all ranks."""
    d_updates: int = 0
    """Discriminator updates, skipped ones included: lazy penalties count by it."""
    g_updates: int = 0
    """Generator updates, skipped ones included."""
    averaged_images: int = 0
    """Images at the last update of the averaged generator."""
    seconds: float = 0.0
    """Time spent training, over all attempts."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """The objective's memory."""

    def table(self) -> dict[str, TensorFacts]:
        """Shapes and dtypes of the objective's running statistics."""
        return {name: facts_of(tensor) for name, tensor in self.memory.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The objective's memory."""
        return iter(self.memory.items())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a state from `tensors`.

        Raises:
            ValueError: the checkpoint has the running statistics of another objective.
        """
        check_table("the objective's memory", tensors, self.table())
        for name, tensor in tensors.items():
            self.memory[name].copy_(tensor)

    def values(self) -> dict[str, Any]:
        """Counters."""
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


class _StreamState:
    """A stream has no tensors."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def values(self) -> dict[str, Any]:
        return self._stream.values()

    def load_values(self, values: dict[str, Any]) -> None:
        check_stream(Record(values, place="the place in the data"))
        self._stream.load_values({"damaged": []} | values)  # the earliest checkpoints lack this entry

    def table(self) -> dict[str, TensorFacts]:
        return {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        check_table("the stream", tensors, {})


@dataclass
class TrainState:
    """Every part of a run that has a past. The keys of `parts` are the checkpoint's contract."""

    generator: Player
    discriminator: Player
    ema: GeneratorEMA
    stream: Stream
    progress: Progress
    recovery: Recovery

    def parts(self) -> dict[str, Stateful]:
        """Stateful parts that a checkpoint stores, by name."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "stream": _StreamState(self.stream),
            "progress": self.progress,
            "recovery": self.recovery,
        }
