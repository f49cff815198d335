"""An adversarial loss joined with penalties: what one turn minimises."""

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
"""Small tensors that an objective keeps from update to update."""

LECAM_DECAY = 0.99
"""Of the running means of the logits (Tseng et al. 2021, section 4)."""


class Objective(Protocol):
    """What the two turns of a game minimise."""

    needs_real_in_g_turn: bool
    """Whether the generator's turn compares with real images, and so takes a batch of its own."""

    def discriminator_loss(
        self, G: Network, D: Network, batch: Batch, draws: Draws, knobs: Knobs, memory: Memory
    ) -> Losses:
        """Loss of the discriminator's turn; generated images carry no gradient to G."""
        ...

    def generator_loss(
        self, G: Network, D: Network, batch: Batch, draws: Draws, knobs: Knobs, memory: Memory
    ) -> Losses:
        """Loss of the generator's turn."""
        ...

    def initial_memory(self, device: torch.device, dtype: torch.dtype) -> Memory:
        """The memory of a run that begins."""
        ...

    def remember(self, memory: Memory, observed: dict[str, Tensor]) -> None:
        """Moves the memory, in place, by what an update observed, already averaged over all ranks."""
        ...


class AdversarialObjective:
    """Any of the losses with any of the penalties.

    Args:
        section: the settings.
        latent_dim: numbers in a latent.
        penalties_apart: penalties make their own forward pass with autocast off, as mixed precision needs; else R1
            and R2 share the pass of the loss.
        loss: formulae of both players in place of those that the settings name.
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
        """Adversarial loss on real and generated images, plus the penalties whose weight is not 0."""
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
        """Adversarial loss of freshly generated images; a paired one compares them with the images of `batch`."""
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
        """Running means of the logits for LeCam; nothing otherwise."""
        names = ("lecam/real", "lecam/fake", "lecam/updates") if self.section.lecam > 0 else ()
        return {name: torch.zeros((), device=device, dtype=dtype) for name in names}

    def remember(self, memory: Memory, observed: dict[str, Tensor]) -> None:
        """Running means; the first update sets them."""
        if observed:
            weight = torch.where(memory["lecam/updates"] == 0, 1.0, 1.0 - LECAM_DECAY)
            for name, value in observed.items():
                memory[name].lerp_(value.to(memory[name].dtype), weight.to(memory[name].dtype))
            memory["lecam/updates"] += 1

    def _latents(self, purpose: str, batch: Batch, draws: Draws) -> Tensor:
        return draws.normal(f"latents/{purpose}", draw=batch.draw, slots=batch.slots, shape=(self.latent_dim,))

    def _noisy(self, purpose: str, images: Tensor, batch: Batch, draws: Draws, knobs: Knobs) -> Tensor:
        """Images with instance noise (Sonderby et al. 2017), independent for every turn and slot."""
        if knobs.instance_noise <= 0:
            return images
        noise = draws.normal(purpose, draw=batch.draw, slots=batch.slots, shape=tuple(images.shape[1:]))
        return images + knobs.instance_noise * noise.to(images.dtype)

    def _critic(self, D: Network, labels_B: Tensor | None, images: Tensor) -> Tensor:
        """The discriminator in the precision of its weights, whatever autocast says."""
        with torch.autocast(images.device.type, enabled=False):
            return D(images, labels_B)


def _full(logits_B: Tensor) -> Tensor:
    """Logits out of autocast's half precision; float64 stays."""
    return logits_B.float() if logits_B.dtype in (torch.bfloat16, torch.float16) else logits_B
