"""Joins an adversarial loss with penalties to the loss that one player (discriminator or generator) minimises."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dist_gan.draws import Draws
from dist_gan.objectives import losses, penalties
from dist_gan.objectives.section import ObjectiveSection
from dist_gan.types import Batch, Knobs, Losses, Network

Memory = dict[str, Tensor]
"""Small tensors by name that an objective keeps from one update to the next, such as running means of the logits."""

LECAM_DECAY = 0.99
"""Decay factor, per discriminator update, of the running means of the logits in the LeCam penalty.

Source: Tseng et al. 2021, section 4.
"""


class Objective(Protocol):
    """Losses of both players, the discriminator and the generator, as the training loop calls them."""

    needs_real_in_g_turn: bool
    """True if the generator's loss compares with real images, so that each generator update takes a batch of its own."""

    def discriminator_loss(
        self, G: Network, D: Network, batch: Batch, draws: Draws, knobs: Knobs, memory: Memory
    ) -> Losses:
        """Computes the loss that the discriminator minimises; generated images carry no gradient to G."""
        ...

    def generator_loss(
        self, G: Network, D: Network, batch: Batch, draws: Draws, knobs: Knobs, memory: Memory
    ) -> Losses:
        """Computes the loss that the generator minimises."""
        ...

    def initial_memory(self, device: torch.device, dtype: torch.dtype) -> Memory:
        """Returns the memory with which a run begins."""
        ...

    def remember(self, memory: Memory, observed: dict[str, Tensor]) -> None:
        """Updates the memory in place with the values that an update observed, already averaged over all ranks."""
        ...


class AdversarialObjective:
    """Joins any adversarial loss with any of the penalties.

    Args:
        section: settings of the losses and penalties.
        latent_dim: length of a latent vector.
        penalties_apart: True computes penalties in a forward pass of their own with autocast off, as mixed precision
            needs; False lets R1 and R2 share the forward pass of the loss.
        loss: formulae of discriminator and generator, used instead of the loss that the settings name.
    """

    def __init__(
        self,
        section: ObjectiveSection,
        *,
        latent_dim: int,
        penalties_apart: bool = False,
        loss: losses.Loss | None = None,
    ) -> None:
        self.section = section
        self.latent_dim = latent_dim
        self.penalties_apart = penalties_apart
        self.loss = loss or losses.LOSSES[section.kind]
        self.needs_real_in_g_turn = self.loss.is_paired

    def discriminator_loss(
        self, G: Network, D: Network, batch: Batch, draws: Draws, knobs: Knobs, memory: Memory
    ) -> Losses:
        """Computes the adversarial loss on real and generated images, plus the penalties whose weight is not 0."""
        with torch.no_grad():
            fake = G(self._latents("discriminator", batch, draws), batch.labels)
        real = self._noisy("noise/discriminator/real", batch.images, batch, draws, knobs)
        fake = self._noisy("noise/discriminator/fake", fake.to(real.dtype), batch, draws, knobs)
        real = real.detach().requires_grad_(knobs.r1_gamma > 0 and not self.penalties_apart)
        fake = fake.detach().requires_grad_(knobs.r2_gamma > 0 and not self.penalties_apart)
        real_B, fake_B = _full(D(real, batch.labels)), _full(D(fake, batch.labels))
        total = self.loss.discriminator(real_B=real_B, fake_B=fake_B, label_smoothing=self.section.label_smoothing)
        terms = {
            "loss/discriminator": total,
            "logits/real": real_B.mean(),
            "logits/fake": fake_B.mean(),
            "logits/real_positive": (real_B > 0).to(real_B.dtype).mean(),
        }
        critic = partial(self._critic, D, batch.labels)
        for name, gamma, images, logits_B in (
            ("r1", knobs.r1_gamma, real, real_B),
            ("r2", knobs.r2_gamma, fake, fake_B),
        ):
            if gamma > 0:
                if self.penalties_apart:
                    images = images.detach().requires_grad_()
                    logits_B = critic(images)
                squared = penalties.squared_gradient_norm(images, logits_B).mean()
                total = total + 0.5 * gamma * squared
                terms[f"penalty/{name}"] = squared
        if knobs.gradient_penalty > 0:
            weight_B = draws.uniform("interpolation", draw=batch.draw, slots=batch.slots)
            points = penalties.interpolate(real.detach(), fake.detach(), weight_B=weight_B)
            penalty = penalties.unit_gradient_penalty(critic, points).mean()
            total = total + knobs.gradient_penalty * penalty
            terms["penalty/gradient_penalty"] = penalty
        observed: dict[str, Tensor] = {}
        if self.section.lecam > 0:
            observed = {"lecam/real": real_B.detach().mean(), "lecam/fake": fake_B.detach().mean()}
            apart = losses.lecam(
                real_B=real_B, fake_B=fake_B, mean_real=memory["lecam/real"], mean_fake=memory["lecam/fake"]
            )
            total = total + self.section.lecam * memory["lecam/updates"].clamp(max=1.0) * apart
            terms["penalty/lecam"] = apart
        return Losses(total, {name: term.detach() for name, term in terms.items()}, observed)

    def generator_loss(
        self, G: Network, D: Network, batch: Batch, draws: Draws, knobs: Knobs, memory: Memory
    ) -> Losses:
        """Computes the adversarial loss of newly generated images.

        A paired loss compares each generated image with a real image of `batch`.
        """
        purpose = "discriminator" if self.section.shared_batch else "generator"
        fake = G(self._latents(purpose, batch, draws), batch.labels)
        fake_B = _full(D(self._noisy("noise/generator/fake", fake, batch, draws, knobs), batch.labels))
        real_B = fake_B.new_empty(0)
        if self.needs_real_in_g_turn:
            with torch.no_grad():
                real = self._noisy("noise/generator/real", batch.images, batch, draws, knobs)
                real_B = _full(D(real, batch.labels))
        total = self.loss.generator(fake_B=fake_B, real_B=real_B)
        return Losses(total, {"loss/generator": total.detach(), "logits/generated": fake_B.detach().mean()}, {})

    def initial_memory(self, device: torch.device, dtype: torch.dtype) -> Memory:
        """Returns zeros for the running means of the logits and their number of updates, or nothing without LeCam."""
        names = ("lecam/real", "lecam/fake", "lecam/updates") if self.section.lecam > 0 else ()
        return {name: torch.zeros((), device=device, dtype=dtype) for name in names}

    def remember(self, memory: Memory, observed: dict[str, Tensor]) -> None:
        """Updates the running means of the logits in place; the first update sets each mean to the observed value."""
        if observed:
            weight = torch.where(memory["lecam/updates"] == 0, 1.0, 1.0 - LECAM_DECAY)
            for name, value in observed.items():
                memory[name].lerp_(value.to(memory[name].dtype), weight.to(memory[name].dtype))
            memory["lecam/updates"] += 1

    def _latents(self, purpose: str, batch: Batch, draws: Draws) -> Tensor:
        return draws.normal(f"latents/{purpose}", draw=batch.draw, slots=batch.slots, shape=(self.latent_dim,))

    def _noisy(self, purpose: str, images: Tensor, batch: Batch, draws: Draws, knobs: Knobs) -> Tensor:
        """Adds instance noise (Sonderby et al. 2017) to images, independent for every image and every loss."""
        if knobs.instance_noise <= 0:
            return images
        noise = draws.normal(purpose, draw=batch.draw, slots=batch.slots, shape=tuple(images.shape[1:]))
        return images + knobs.instance_noise * noise.to(images.dtype)

    def _critic(self, D: Network, labels_B: Tensor | None, images: Tensor) -> Tensor:
        """Runs the discriminator in the precision of its weights, with autocast off."""
        with torch.autocast(images.device.type, enabled=False):
            return D(images, labels_B)


def _full(logits_B: Tensor) -> Tensor:
    """Converts logits of half precision to float32; returns float32 and float64 logits unchanged."""
    return logits_B.float() if logits_B.dtype in (torch.bfloat16, torch.float16) else logits_B
