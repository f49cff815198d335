"""Penalties on the discriminator's gradient with respect to its input, themselves differentiable.

A penalty that shares the forward pass of the loss takes (images, logits); a penalty that makes a forward pass of its own
takes (critic, images), where the critic is the discriminator as a function of images alone.
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
"""Name of the logged scalar of each gradient penalty, by the setting in the section `objective` that is the penalty's
weight."""


def input_gradient(images: Tensor, logits_B: Tensor) -> Tensor:
    """Computes the gradient of each image's logit with respect to that image, with its graph kept; shape of `images`.

    Autocast is switched off, because it would lower the precision of this gradient, which the penalty is computed from.
    """
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(logits_B.sum(), images, create_graph=True)
    return gradient


def squared_gradient_norm(images: Tensor, logits_B: Tensor) -> Tensor:
    """Computes |grad D(x)|^2 for each image, shape (B,), at real images for R1 and at generated images for R2.

    The penalty is gamma / 2 times the mean of this value (Mescheder, Geiger, Nowozin 2018, eq. 9 and 10).
    """
    return input_gradient(images, logits_B).flatten(1).square().sum(dim=1)


def unit_gradient_penalty(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Computes (|grad D(x)| - 1)^2 at each given point, shape (B,).

    The mean times the weight lambda is the WGAN-GP penalty (Gulrajani et al. 2017, eq. 3).
    """
    images = images.detach().requires_grad_()
    squared_B = squared_gradient_norm(images, critic(images))
    return ((squared_B + 1e-12).sqrt() - 1.0).square()


def interpolate(real: Tensor, fake: Tensor, *, weight_B: Tensor) -> Tensor:
    """Interpolates between each real image (weight 0) and the generated image at the same index (weight 1)."""
    return torch.lerp(real, fake, weight_B.view(-1, *[1] * (real.dim() - 1)).to(real.dtype))
