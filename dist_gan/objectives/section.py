"""Settings of the losses and penalties: the section `objective` of a run's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dist_gan.config.values import Count, Knob, Real, Section
from dist_gan.objectives.losses import LOSSES

if TYPE_CHECKING:
    LossKind = str
else:
    LossKind = Literal[tuple(LOSSES)]


class ObjectiveSection(Section):
    """Losses of both networks, and regularisation of the discriminator."""

    kind: LossKind = "relativistic"
    """Loss function of generator and discriminator. Formulae and sources are in dist_gan/objectives/losses.py."""
    r1_gamma: Knob = 0.0
    """Weight gamma of the R1 penalty (Mescheder et al. 2018); 0 turns it off.

    R1 is gamma / 2 times the mean squared norm of the discriminator's gradient at real images.
    """
    r2_gamma: Knob = 0.0
    """Weight gamma of the R2 penalty (Mescheder et al. 2018); 0 turns it off.

    R2 is gamma / 2 times the mean squared norm of the discriminator's gradient at generated images.
    """
    gradient_penalty: Knob = 0.0
    """Weight lambda of the WGAN-GP gradient penalty (Gulrajani et al. 2017); 0 turns it off.

    The penalty is lambda times the mean of (norm of the discriminator's gradient - 1)^2 at random interpolations of
    real and generated images.
    """
    penalty_every: Annotated[Count, Field(ge=1, le=10**6)] = 1
    """Interval k, in discriminator updates, at which R1, R2 and WGAN-GP penalties are applied with k times their weight.

    This is lazy regularisation (Karras et al. 2020). 1 applies the penalties at every update.
    """
    instance_noise: Knob = 0.0
    """Standard deviation of the Gaussian noise that is added to all images that the discriminator receives; 0 adds none."""
    label_smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = 0.0
    """Strength of one-sided label smoothing: the discriminator's target for real images is 1 minus this value.

    The losses `minimax` and `nonsaturating` have such targets; other losses require 0, which turns smoothing off.
    """
    lecam: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the LeCam regularisation (Tseng et al. 2021), which reduces overfitting to small data sets; 0 turns it off.

    LeCam penalises the squared distance of logits of real images from the running mean of logits of generated images,
    and the reverse.
    """
    shared_batch: bool = False
    """Shared batch: the generator update reuses the real images and latents of the last discriminator update.

    False draws new images and latents for the generator update.
    """
