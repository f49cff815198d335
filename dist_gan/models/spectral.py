"""Spectral normalisation (Miyato et al. 2018): divides each weight, as a matrix, by its largest singular value.

The singular value is u^T W v, where u and v are the vectors of a power iteration. These vectors are buffers that change
once per update of the weights. Usual implementations change them once per forward pass; here all micro-batches of one
update see the same network, so that gradient accumulation stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, embedding, linear, normalize

_FIRST_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """Base class of layers with spectral normalisation: holds the vectors u and v of the power iteration."""

    weight: nn.Parameter
    u: Tensor
    v: Tensor

    def begin(self) -> None:
        """Starts the power iteration with random vectors, after the weight has been initialised."""
        matrix = self.weight.detach().flatten(1)
        self.register_buffer("u", normalize(torch.randn(matrix.shape[0], dtype=matrix.dtype), dim=0))
        self.register_buffer("v", normalize(torch.randn(matrix.shape[1], dtype=matrix.dtype), dim=0))
        for _ in range(_FIRST_ITERATIONS):
            self.iterate(self.weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Makes one step of the power iteration with the whole weight; is called after each update of the weight."""
        matrix = weight.detach().flatten(1)
        self.v.copy_(normalize(matrix.t() @ self.u, dim=0))
        self.u.copy_(normalize(matrix @ self.v, dim=0))

    def normed_weight(self) -> Tensor:
        """Returns the weight divided by its largest singular value; gradients flow through weight and singular value."""
        with torch.autocast(self.weight.device.type, enabled=False):  # in bf16 the norm would have an error of 1/256
            sigma = torch.dot(self.u, self.weight.flatten(1) @ self.v)
            return self.weight / sigma


class SpectralConv2d(SpectralNorm, nn.Conv2d):  # type: ignore[misc] # one weight, named by both
    """Convolution whose weight, as a matrix of output channels by all other axes, has spectral norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        return conv2d(input, self.normed_weight(), self.bias, self.stride, self.padding)


class SpectralLinear(SpectralNorm, nn.Linear):  # type: ignore[misc]
    """Dense layer whose weight has spectral norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.normed_weight(), self.bias)


class SpectralEmbedding(SpectralNorm, nn.Embedding):  # type: ignore[misc]
    """Embedding whose table, as a matrix, has spectral norm 1."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.normed_weight())


def begin_spectral(network: nn.Module) -> None:
    """Starts the power iterations of all spectrally normalised layers of a network, after its weights are initialised."""
    for module in network.modules():
        if isinstance(module, SpectralNorm):
            module.begin()


def spectral_weights(network: nn.Module) -> dict[str, SpectralNorm]:
    """Returns the spectrally normalised layers of a network, each by the name of its weight."""
    return {f"{name}.weight": m for name, m in network.named_modules() if isinstance(m, SpectralNorm)}
