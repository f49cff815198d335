"""Penalties on the discriminator's gradient at its input, differentiable once more.

A penalty takes (images, logits) where it shares the loss' forward pass, and (critic, images) where it makes its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PENALTIES = {
    "r1_gamma": "penalty/r1",
    "r2_gamma": "penalty/r2",
    "gradient_penalty": "penalty/gradient_penalty",
}
"""Every gradient penalty: the setting of `objective` that is its weight, and the scalar that it is logged as."""


def input_gradient(images: Tensor, logits_B: Tensor) -> Tensor:
    """Gradient of each image's logit at that image, shape of `images`, with its graph kept.

    Autocast is off: it would reach into this backward pass too, which is part of the penalty's forward pass.
    """
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(logits_B.sum(), images, create_graph=True)
    return gradient


def squared_gradient_norm(images: Tensor, logits_B: Tensor) -> Tensor:
    """|grad D(x)|^2 summed over all but the batch, B: R1 at real images, R2 at generated ones.

    The penalty is gamma / 2 times its mean (Mescheder, Geiger, Nowozin 2018, eq. 9 and 10).
    """
    return input_gradient(images, logits_B).flatten(1).square().sum(dim=1)


def unit_gradient_penalty(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(|grad D(x)| - 1)^2, B, at the given points; lambda times its mean is WGAN-GP (Gulrajani et al. 2017, eq. 3)."""
    images = images.detach().requires_grad_()
    squared_B = squared_gradient_norm(images, critic(images))
    return ((squared_B + 1e-12).sqrt() - 1.0).square()


def interpolate(real: Tensor, fake: Tensor, *, weight_B: Tensor) -> Tensor:
    """Points between each real image (weight 0) and the generated image of its slot (weight 1)."""
    return torch.lerp(real, fake, weight_B.view(-1, *[1] * (real.dim() - 1)).to(real.dtype))
