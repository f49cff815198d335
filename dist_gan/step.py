"""One adversarial step: the discriminator's turns, the generator's turn, and the update of the averaged generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dist_gan.draws import Draws
from dist_gan.objectives import Objective
from dist_gan.runtime import Player, Runtime, Update
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import lazily
from dist_gan.state import TrainState
from dist_gan.types import Batch, Knobs, Losses


@dataclass(frozen=True)
class Rules:
    """Numbers of a training step that stay the same for the whole run."""

    batch: int
    """Number of images in a global batch, over all ranks."""
    d_updates: int = 1
    """Number of discriminator updates for each generator update."""
    micro_batch: int | None = None
    """Largest number of images in one forward pass of a rank; None for the rank's whole share of the batch."""
    penalty_every: int = 1
    """Interval k, in discriminator updates: gradient penalties are applied at every k-th update, k times as strong."""
    fresh_batch_for_g: bool = False
    """True if the generator's turn takes a batch of real images of its own, and not the discriminator's last one."""


class _Turn(NamedTuple):
    """One player's update: the player that is trained, the one that is frozen, the loss, and the optimizer's rates."""

    active: Player
    resting: Player
    loss_of: Callable[..., Losses]
    lr: float
    beta2: float


@dataclass(frozen=True)
class Game:
    """The parts of a training step; all but `state` stay the same for the whole run."""

    runtime: Runtime
    """This process, its device and its process groups."""
    state: TrainState
    """Both players, the averaged generator, the stream of real images and the counters."""
    objective: Objective
    """Losses of both players."""
    draws: Draws
    """Random numbers of the run."""
    rules: Rules
    """Batch size, micro-batches and numbers of turns."""

    def step(self, knobs: Knobs, scalars: ScalarMeans) -> list[Update]:
        """Runs `rules.d_updates` discriminator turns and one generator turn, and updates the averaged generator.
        Collective.

        The counters in `state.progress` are advanced. An update whose gradient is not finite is skipped: weights,
        buffers and the objective's memory stay as they were.

        Args:
            knobs: values of the scheduled settings for this step.
            scalars: receives losses and gradient norms of the updates that were applied.

        Returns:
            Result of each update in order; the generator's is the last.
        """
        state, rules, progress = self.state, self.rules, self.state.progress
        generator, discriminator, objective = state.generator, state.discriminator, self.objective
        updates = []
        for _ in range(rules.d_updates):
            self.runtime.mark("reading images")
            batch = state.stream.next()
            due = lazily(knobs, update=progress.d_updates, every=rules.penalty_every)
            turn = _Turn(discriminator, generator, objective.discriminator_loss, lr=knobs.d_lr, beta2=knobs.d_beta2)
            updates.append(self._update(turn, batch, due, scalars))
            progress.d_updates += 1
            progress.images += rules.batch
        if rules.fresh_batch_for_g:
            batch = state.stream.next()
        turn = _Turn(generator, discriminator, objective.generator_loss, lr=knobs.g_lr, beta2=knobs.g_beta2)
        updates.append(self._update(turn, batch, knobs, scalars))
        progress.g_updates += 1
        if updates[-1].applied:
            state.ema.update(
                generator.weights(),
                generator.module.buffers(),
                images=progress.images - progress.averaged_images,
                half_life=knobs.ema_half_life,
            )
            progress.averaged_images = progress.images
        return updates

    def _update(self, turn: _Turn, batch: Batch, knobs: Knobs, scalars: ScalarMeans) -> Update:
        """Makes one player's update on one batch: gradients of all micro-batches, a check that they are finite, one
        optimizer step.
        """
        runtime, draws, memory = self.runtime, self.draws, self.state.memory
        active, resting = turn.active, turn.resting
        buffers = _floating_buffers(active, resting)
        before = [b.clone() for b in buffers]
        pieces = list(_pieces(batch, self.rules.micro_batch))
        terms: list[dict[str, Tensor]] = []
        observed: dict[str, Tensor] = {}
        for index, piece in enumerate(pieces):
            # Dropout and noise inputs inside a network draw from torch's generator. It is seeded at every
            # micro-batch, so # that no generator state has to be stored in checkpoints.
            runtime.seed(draws.seed_for(f"turn/{active.name}/{index}", draw=batch.draw, rank=runtime.rank))
            with runtime.turn(active, resting, last_micro=index == len(pieces) - 1) as (G, D):
                losses = turn.loss_of(G, D, piece, draws, knobs, memory)
                runtime.mark(f"the {active.name}'s backward pass")
            active.backward(losses.total / len(pieces))
            terms.append(losses.terms)
            for name, value in losses.observed.items():
                observed[name] = observed.get(name, 0.0) + value / len(pieces)
        runtime.mark(f"the {active.name}'s update")
        update = active.update(lr=turn.lr, beta2=turn.beta2)
        if update.applied:
            runtime.average_buffers(active, resting)
            if observed:
                means = runtime.training_group.mean(torch.stack(list(observed.values())))
                self.objective.remember(memory, dict(zip(observed, means, strict=True)))
            for piece_terms in terms:
                scalars.add(piece_terms)
            scalars.add({f"gradient_norm/{active.name}": torch.tensor(update.norm)})
        else:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
        return update


def _floating_buffers(*players: Player) -> list[Tensor]:
    """Returns the players' floating-point buffers (running statistics), which a batch with bad values would spoil."""
    return [b for player in players for b in player.module.buffers() if b.is_floating_point()]


def _pieces(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Yields the batch in micro-batches of at most `size` images, in slot order; None yields the whole batch."""
    total = len(batch.slots)
    size = size or total
    for start in range(0, total, size):
        part = slice(start, start + size)
        yield Batch(
            images=batch.images[part],
            labels=None if batch.labels is None else batch.labels[part],
            slots=batch.slots[part],
            keys=batch.keys[part],
            draw=batch.draw,
        )
