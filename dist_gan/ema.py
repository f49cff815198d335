"""The averaged generator: an exponential moving average of the weights, with its half-life in images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dist_gan.types import TensorFacts, check_table, facts_of


class GeneratorEMA:
    """Exponential moving average of a generator, in evaluation mode, without gradients; its buffers are copied, not
    averaged.

    After n images the weight of an old value is 0.5 ** (n / half-life), whatever the batch (Karras et al. 2018,
    appendix; half-life in images as in StyleGAN2).
    """

    def __init__(self, generator: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self.module = copy.deepcopy(generator).to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._parameters = dict(self.module.named_parameters())

    @torch.no_grad()
    def update(
        self, weights: Iterable[Mapping[str, Tensor]], buffers: Iterable[Tensor], *, images: int, half_life: float
    ) -> None:
        """Moves the average towards the generator's present weights.

        Args:
            weights: the generator's parameters by name, in parts: they need not all be whole at once.
            buffers: the generator's buffers, in order.
            images: images seen since the last update of the average.
            half_life: half-life of the average, in images; 0 copies the weights.
        """
        weight = 1.0 - 0.5 ** (images / half_life) if half_life > 0 else 1.0
        for part in weights:
            torch._foreach_lerp_([self._parameters[name] for name in part], list(part.values()), weight)
        for average, current in zip(self.module.buffers(), buffers, strict=True):
            average.copy_(current)

    def table(self) -> dict[str, TensorFacts]:
        """Returns the shapes and dtypes of the averaged parameters and buffers, by name."""
        return {name: facts_of(tensor) for name, tensor in self.module.state_dict().items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the averaged parameters and buffers by name."""
        return iter(self.module.state_dict().items())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a state from `tensors`. Raises ValueError if names or shapes are not this network's."""
        check_table("the averaged generator", tensors, self.table())
        self.module.load_state_dict(tensors)
