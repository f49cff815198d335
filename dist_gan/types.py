"""Value types that modules exchange; exceptions that end a run are in `mistakes`.

Shape legend, used as a suffix on tensor names: B batch, C channels, H height, W width, Z latent, K classes, N flat.
Images are float in [-1, 1] once the stream has put them on the device; they travel as uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_gan.mistakes import TrainingFailed as TrainingFailed
from dist_gan.mistakes import UserError as UserError

Scalars = dict[str, float]
"""Numbers that have been reduced: equal on every rank."""

Network = Callable[..., Tensor]
"""Network of a player in its turn: `G(latents_BZ, labels_B) -> images_BCHW`, `D(images_BCHW, labels_B) -> logits_B`."""


class Batch(NamedTuple):
    """This rank's part of one global batch."""

    images: Tensor
    """Real images, float, BCHW in [-1, 1]; or BN points for data that are no pictures."""
    labels: Tensor | None
    """Class of each image, int64, B; None if the data have no labels."""
    slots: Tensor
    """Place of each image in the global batch, int64, B, on the CPU."""
    keys: tuple[str, ...]
    """Name of each image in its shards."""
    draw: int
    """Number of the global batch since the start of the run."""


class Losses(NamedTuple):
    """Result of an objective: the loss, and scalars for the log."""

    total: Tensor
    """Scalar to be minimised by the active player."""
    terms: dict[str, Tensor]
    """Detached scalars for the log, each a mean over the batch."""
    observed: dict[str, Tensor]
    """Detached means over the batch, from which the objective's memory is updated after averaging over the ranks."""


class Knobs(NamedTuple):
    """Values of all scheduled settings at one moment of training."""

    g_lr: float
    d_lr: float
    g_beta2: float
    d_beta2: float
    r1_gamma: float
    r2_gamma: float
    gradient_penalty: float
    instance_noise: float
    ema_half_life: float


class Networks(NamedTuple):
    """The two networks of a run, before a parallel strategy wraps them."""

    generator: nn.Module
    discriminator: nn.Module


class TensorFacts(NamedTuple):
    """Shape and dtype of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's elements, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class HasTensors(Protocol):
    """A part of a run whose state is tensors by name."""

    def table(self) -> dict[str, TensorFacts]:
        """Returns names, shapes and dtypes of the part's tensors, in their order; equal on every rank."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields unsharded tensors by name, one at a time; each may be freed once the next is requested. Collective."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a state from the tensors that `tensors` yielded. Raises ValueError if names or shapes differ."""
        ...


@runtime_checkable
class HasValues(Protocol):
    """A part of a run whose state is JSON values by name."""

    def values(self) -> dict[str, Any]:
        """Returns JSON values by name; equal on every rank."""
        ...

    def load_values(self, values: dict[str, Any]) -> None:
        """Restores a state from the JSON values that `values` returned. Raises ValueError if they are invalid."""
        ...


Part = HasTensors | HasValues
"""A part of a run that a checkpoint stores: its state is tensors, or JSON values, or both."""


def unit_range(images_uint8: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Converts bytes 0..255 to floats in [-1, 1]."""
    return images_uint8.to(dtype).div_(127.5).sub_(1.0)


def byte_range(images: Tensor) -> Tensor:
    """Converts floats in [-1, 1] to bytes 0..255, rounded; values outside are clamped."""
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def facts_of(tensor: Tensor) -> TensorFacts:
    """Returns the shape and dtype of a tensor."""
    return TensorFacts(tuple(tensor.shape), tensor.dtype)


def check_table(
    owner: str, tensors: Mapping[str, Tensor] | Mapping[str, TensorFacts], table: Mapping[str, TensorFacts]
) -> None:
    """Compares names and shapes of tensors from a file with those that are expected.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; `owner` names the owner of the tensors.
    """
    missing, unknown = sorted(table.keys() - tensors.keys()), sorted(tensors.keys() - table.keys())
    if missing or unknown:
        raise ValueError(f"{owner}: tensors missing {missing[:5]}, unknown {unknown[:5]}")
    for name, facts in table.items():
        if tuple(tensors[name].shape) != facts.shape:
            raise ValueError(f"{owner}: {name} is {tuple(tensors[name].shape)} and has to be {facts.shape}")
