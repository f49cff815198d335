"""The averaged generator: an exponential moving average of the weights, with its half-life in images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class GeneratorEMA:
    """Average of a generator's parameters; buffers are copied. In evaluation mode, without gradients.

    After n images the weight of an old value is 0.5 ** (n / half-life), whatever the batch (Karras et al. 2018,
    appendix; half-life in images as in StyleGAN2).
    """

    def __init__(self, generator: nn.Module) -> None:
        self.module = copy.deepcopy(generator).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, generator: nn.Module, *, images: int, half_life: float) -> None:
        """Moves the average by `images` seen since the last update; a half-life of 0 copies."""
        weight = 1.0 - 0.5 ** (images / half_life) if half_life > 0 else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(generator.parameters()), weight)
        for average, current in zip(self.module.buffers(), generator.buffers(), strict=True):
            average.copy_(current)

    def tensors(self) -> dict[str, Tensor]:
        """Averaged parameters and buffers by name."""
        return dict(self.module.state_dict())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        self.module.load_state_dict(tensors)

    def values(self) -> dict[str, Any]:
        """Nothing but tensors is kept."""
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        """Nothing but tensors is kept."""
        assert not values
