"""Adversarial losses on logits: each loss takes the logits of B real and B generated images, and returns a scalar.

In the formulae, x = D(real), f = D(generated) and s = softplus, so that s(-x) = -log sigmoid(x) and
s(f) = -log(1 - sigmoid(f)); E is the mean over the batch, and (a)+ is a where it is positive, else 0.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn.functional import relu, softplus


class DiscriminatorLoss(Protocol):
    """Formula of an adversarial loss that the discriminator minimises."""

    def __call__(self, *, real_B: Tensor, fake_B: Tensor, label_smoothing: float) -> Tensor:
        """Computes the discriminator's loss, a scalar.

        Args:
            real_B: logits of real images.
            fake_B: logits of generated images.
            label_smoothing: amount by which the target 1 of real images is lowered (Salimans et al. 2016); 0 for a loss
                without targets.
        """
        ...


class GeneratorLoss(Protocol):
    """Formula of an adversarial loss that the generator minimises."""

    def __call__(self, *, fake_B: Tensor, real_B: Tensor) -> Tensor:
        """Computes the generator's loss, a scalar; `real_B` has no elements unless the loss is paired."""
        ...


class Loss(NamedTuple):
    """One kind of adversarial loss: the formulae of discriminator and generator, and what the formulae need."""

    discriminator: DiscriminatorLoss
    generator: GeneratorLoss
    description: str
    """Both formulae and their source."""
    is_paired: bool = False
    """True if the generator's formula compares each generated image with the real image at the same index of the batch."""
    has_targets: bool = False
    """True if the discriminator's formula is a cross-entropy with targets, which label smoothing can move."""


def _cross_entropy(*, real_B: Tensor, fake_B: Tensor, label_smoothing: float) -> Tensor:
    real = (1.0 - label_smoothing) * softplus(-real_B) + label_smoothing * softplus(real_B)
    return real.mean() + softplus(fake_B).mean()


def _minimax_generator(*, fake_B: Tensor, real_B: Tensor) -> Tensor:
    return -softplus(fake_B).mean()


def _nonsaturating_generator(*, fake_B: Tensor, real_B: Tensor) -> Tensor:
    return softplus(-fake_B).mean()


def _hinge_discriminator(*, real_B: Tensor, fake_B: Tensor, label_smoothing: float) -> Tensor:
    return relu(1.0 - real_B).mean() + relu(1.0 + fake_B).mean()


def _least_squares_discriminator(*, real_B: Tensor, fake_B: Tensor, label_smoothing: float) -> Tensor:
    return 0.5 * (real_B - 1.0).square().mean() + 0.5 * fake_B.square().mean()


def _least_squares_generator(*, fake_B: Tensor, real_B: Tensor) -> Tensor:
    return 0.5 * (fake_B - 1.0).square().mean()


def _wasserstein_discriminator(*, real_B: Tensor, fake_B: Tensor, label_smoothing: float) -> Tensor:
    return fake_B.mean() - real_B.mean()


def _negative_mean(*, fake_B: Tensor, real_B: Tensor) -> Tensor:
    return -fake_B.mean()


def _relativistic_discriminator(*, real_B: Tensor, fake_B: Tensor, label_smoothing: float) -> Tensor:
    return softplus(fake_B - real_B).mean()


def _relativistic_generator(*, fake_B: Tensor, real_B: Tensor) -> Tensor:
    return softplus(real_B - fake_B).mean()


LOSSES: dict[str, Loss] = {
    "minimax": Loss(
        _cross_entropy,
        _minimax_generator,
        "D minimises E s(-x) + E s(f), G minimises -E s(f) (Goodfellow et al. 2014, eq. 1)",
        has_targets=True,
    ),
    "nonsaturating": Loss(
        _cross_entropy,
        _nonsaturating_generator,
        "D minimises E s(-x) + E s(f), G minimises E s(-f) (Goodfellow et al. 2014, section 3)",
        has_targets=True,
    ),
    "hinge": Loss(
        _hinge_discriminator,
        _negative_mean,
        "D minimises E (1-x)+ + E (1+f)+, G minimises -E f (Lim and Ye 2017; Miyato et al. 2018)",
    ),
    "least_squares": Loss(
        _least_squares_discriminator,
        _least_squares_generator,
        "D minimises E (x-1)^2/2 + E f^2/2, G minimises E (f-1)^2/2 (Mao et al. 2017, eq. 9)",
    ),
    "wasserstein": Loss(
        _wasserstein_discriminator,
        _negative_mean,
        "D minimises E f - E x, G minimises -E f (Arjovsky et al. 2017)",
    ),
    "relativistic": Loss(
        _relativistic_discriminator,
        _relativistic_generator,
        "D minimises E s(f-x), G minimises E s(x-f) (Jolicoeur-Martineau 2020; Huang et al. 2024)",
        is_paired=True,
    ),
}
"""Adversarial losses by name; the setting `objective.kind` chooses one."""


def lecam(*, real_B: Tensor, fake_B: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Computes the LeCam penalty E (D(x) - a_F)+^2 + E (a_R - D(G(z)))+^2 (Tseng et al. 2021, eq. 3), a scalar.

    a_R is `mean_real` and a_F is `mean_fake`, the running means of the logits of real and generated images.
    """
    return relu(real_B - mean_fake).square().mean() + relu(mean_real - fake_B).square().mean()
