"""Spectral normalisation (Miyato et al. 2018): each weight divided by its largest singular value, as a matrix.

The singular value is u^T W v with the vectors u and v of a power iteration. The vectors are buffers that move once an
update of the weights and not, as is usual, once a forward pass: so micro-batches of one update see the same network,
and accumulation stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, linear, normalize

_FIRST_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """What the normalised layers share."""

    weight: nn.Parameter
    u: Tensor
    v: Tensor

    def begin(self) -> None:
        """Starts the power iteration, after the weight has been initialised."""
        matrix = self.weight.detach().flatten(1)
        self.register_buffer("u", normalize(torch.randn(matrix.shape[0], dtype=matrix.dtype), dim=0))
        self.register_buffer("v", normalize(torch.randn(matrix.shape[1], dtype=matrix.dtype), dim=0))
        for _ in range(_FIRST_ITERATIONS):
            self.iterate(self.weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Makes one power iteration with the whole weight; to be called after each update of the weight."""
        matrix = weight.detach().flatten(1)
        self.v.copy_(normalize(matrix.t() @ self.u, dim=0))
        self.u.copy_(normalize(matrix @ self.v, dim=0))

    def normed_weight(self) -> Tensor:
        """The weight over its largest singular value; gradients go through both."""
        with torch.autocast(self.weight.device.type, enabled=False):  # in bf16 the norm itself would be off by 1/256
            sigma = torch.dot(self.u, self.weight.flatten(1) @ self.v)
            return self.weight / sigma


class SpectralConv2d(SpectralNorm, nn.Conv2d):  # type: ignore[misc] # one weight, named by both
    """A convolution whose weight, as a matrix of output channels by the rest, has norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        return conv2d(input, self.normed_weight(), self.bias, self.stride, self.padding)


class SpectralLinear(SpectralNorm, nn.Linear):  # type: ignore[misc]
    """A dense layer whose weight has norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.normed_weight(), self.bias)


class SpectralEmbedding(SpectralNorm, nn.Embedding):  # type: ignore[misc]
    """An embedding whose table has norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.normed_weight())


def begin_spectral(network: nn.Module) -> None:
    """Starts the power iterations of a network whose weights have their first values."""
    for module in network.modules():
        if isinstance(module, SpectralNorm):
            module.begin()


def spectral_weights(network: nn.Module) -> dict[str, SpectralNorm]:
    """The normalised layers of a network by the names of their weights."""
    return {f"{name}.weight": m for name, m in network.named_modules() if isinstance(m, SpectralNorm)}
