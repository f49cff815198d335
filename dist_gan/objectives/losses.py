"""Adversarial losses on logits: each takes logits of real and generated images, B, and gives a scalar.

| kind | discriminator minimises | generator minimises | source |
|---|---|---|---|
| minimax | E s(-x) + E s(f) | -E s(f) | Goodfellow et al. 2014, eq. 1 |
| nonsaturating | the same | E s(-f) | Goodfellow et al. 2014, section 3 |
| hinge | E (1-x)+ + E (1+f)+ | -E f | Lim and Ye 2017; Miyato et al. 2018 |
| least_squares | E (x-1)^2/2 + E f^2/2 | E (f-1)^2/2 | Mao et al. 2017, eq. 9 |
| wasserstein | E f - E x | -E f | Arjovsky et al. 2017 |
| relativistic | E s(-(x-f)) | E s(-(f-x)) | Jolicoeur-Martineau 2020; Huang et al. 2024 |

with x = D(real), f = D(generated), s = softplus, so that s(-x) = -log sigmoid(x) and s(f) = -log(1 - sigmoid(f)).
The relativistic pair compares image with image of the same slot.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu, softplus


def discriminator_loss(kind: str, *, real_B: Tensor, fake_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The discriminator's loss.

    Args:
        kind: a row of the table above.
        real_B: logits of real images.
        fake_B: logits of generated images of the same slots.
        label_smoothing: real images get the target 1 - this (Salimans et al. 2016); minimax and nonsaturating only.
    """
    match kind:
        case "minimax" | "nonsaturating":
            real = (1.0 - label_smoothing) * softplus(-real_B) + label_smoothing * softplus(real_B)
            return real.mean() + softplus(fake_B).mean()
        case "hinge":
            return relu(1.0 - real_B).mean() + relu(1.0 + fake_B).mean()
        case "least_squares":
            return 0.5 * (real_B - 1.0).square().mean() + 0.5 * fake_B.square().mean()
        case "wasserstein":
            return fake_B.mean() - real_B.mean()
        case "relativistic":
            return softplus(fake_B - real_B).mean()
    raise AssertionError(f"no loss {kind!r}")


def generator_loss(kind: str, *, fake_B: Tensor, real_B: Tensor | None = None) -> Tensor:
    """The generator's loss; `real_B` is read by the relativistic one alone."""
    match kind:
        case "minimax":
            return -softplus(fake_B).mean()
        case "nonsaturating":
            return softplus(-fake_B).mean()
        case "hinge" | "wasserstein":
            return -fake_B.mean()
        case "least_squares":
            return 0.5 * (fake_B - 1.0).square().mean()
        case "relativistic":
            assert real_B is not None, "the relativistic loss pairs generated images with real ones"
            return softplus(real_B - fake_B).mean()
    raise AssertionError(f"no loss {kind!r}")


def lecam(*, real_B: Tensor, fake_B: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """E (D(x) - a_F)+^2 + E (a_R - D(G(z)))+^2 with running means a of the logits (Tseng et al. 2021, eq. 3)."""
    return relu(real_B - mean_fake).square().mean() + relu(mean_real - fake_B).square().mean()
