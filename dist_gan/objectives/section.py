"""Settings of the objective."""

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
    """Losses of generator and discriminator, and regularisation of the discriminator."""

    kind: LossKind = "relativistic"
    """Loss function of both networks; formulae and sources in dist_gan/objectives/losses.py."""
    r1_gamma: Knob = 0.0
    """R1: gamma / 2 times the mean squared gradient at real images (Mescheder et al. 2018)."""
    r2_gamma: Knob = 0.0
    """R2: gamma / 2 times the mean squared gradient at generated images (Mescheder et al. 2018)."""
    gradient_penalty: Knob = 0.0
    """WGAN-GP: lambda times (gradient norm - 1)^2 between real and generated images (Gulrajani et al. 2017)."""
    penalty_every: Annotated[Count, Field(ge=1, le=10**6)] = 1
    """Interval k, in discriminator updates, at which penalties are applied, k times as strong (lazy regularisation)."""
    instance_noise: Knob = 0.0
    """Standard deviation of the Gaussian noise added to every input of the discriminator."""
    label_smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = 0.0
    """One-sided label smoothing: the target of real images is 1 minus this value (minimax and nonsaturating)."""
    lecam: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of LeCam: pulls the logits towards their running means, against overfitting (Tseng et al. 2021)."""
    shared_batch: bool = False
    """Reuse the discriminator's last batch and latents in the generator update, as the article does."""
