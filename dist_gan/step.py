"""One adversarial update: the discriminator's turns, the generator's turn, the average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_gan.draws import Draws
from dist_gan.objectives import Objective
from dist_gan.runtime import Player, Runtime, Update
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import lazily
from dist_gan.state import TrainState
from dist_gan.types import Batch, Knobs, Losses

LossOf = Callable[..., Losses]


@dataclass(frozen=True)
class Rules:
    """The fixed numbers of an update."""

    batch: int
    """Images of a global batch."""
    d_updates: int = 1
    """Discriminator updates for each of the generator."""
    micro_batch: int | None = None
    """Images that a rank forwards at once; None: its whole share."""
    penalty_every: int = 1
    """Penalties at every k-th discriminator update."""
    fresh_batch_for_g: bool = False
    """Whether the generator's turn takes a batch of its own."""


def train_step(
    runtime: Runtime,
    state: TrainState,
    objective: Objective,
    draws: Draws,
    knobs: Knobs,
    scalars: ScalarMeans,
    *,
    rules: Rules,
) -> list[Update]:
    """Runs `rules.d_updates` discriminator turns and one generator turn, and moves the average.

    Returns what became of each update, the generator's last. Counters in `state.progress` are moved; an update
    whose gradient is not finite leaves weights, buffers and memory as they were.
    """
    generator, discriminator, progress = state.generator, state.discriminator, state.progress
    updates = []
    for _ in range(rules.d_updates):
        runtime.mark("reading images")
        batch = state.stream.next()
        due = lazily(knobs, update=progress.d_updates, every=rules.penalty_every)
        updates.append(
            _turn(
                runtime, state, discriminator, generator, objective, objective.discriminator_loss, batch, draws, due,
                scalars, micro_batch=rules.micro_batch, lr=knobs.d_lr, beta2=knobs.d_beta2,
            )
        )  # fmt: skip
        progress.d_updates += 1
        progress.images += rules.batch
    if rules.fresh_batch_for_g:
        batch = state.stream.next()
    updates.append(
        _turn(
            runtime, state, generator, discriminator, objective, objective.generator_loss, batch, draws, knobs,
            scalars, micro_batch=rules.micro_batch, lr=knobs.g_lr, beta2=knobs.g_beta2,
        )
    )  # fmt: skip
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


def _turn(
    runtime: Runtime,
    state: TrainState,
    active: Player,
    resting: Player,
    objective: Objective,
    loss_of: LossOf,
    batch: Batch,
    draws: Draws,
    knobs: Knobs,
    scalars: ScalarMeans,
    *,
    micro_batch: int | None,
    lr: float,
    beta2: float,
) -> Update:
    """One player's update on one batch: gradients of all pieces, one vote, one move."""
    progress = state.progress
    kept = _floating_buffers(active, resting)
    before = [b.clone() for b in kept]
    pieces = list(_pieces(batch, micro_batch))
    terms: list[dict[str, Tensor]] = []
    observed: dict[str, Tensor] = {}
    for index, piece in enumerate(pieces):
        # What lives inside a network (dropout, noise inputs) draws from torch's generator: it is seeded here, at every
        # turn, so that no generator state has to survive a restart.
        runtime.seed(draws.seed_for(f"turn/{active.name}/{index}", draw=batch.draw, rank=runtime.rank))
        with runtime.turn(active, resting, last_micro=index == len(pieces) - 1) as (G, D):
            losses = loss_of(G, D, piece, draws, knobs, progress.memory)
            runtime.mark(f"the {active.name}'s backward pass")
        active.backward(losses.total / len(pieces))
        terms.append(losses.terms)
        for name, value in losses.observed.items():
            observed[name] = observed.get(name, 0.0) + value / len(pieces)
    runtime.mark(f"the {active.name}'s update")
    update = active.update(lr=lr, beta2=beta2)
    if update.applied:
        runtime.average_buffers(active, resting)
        if observed:
            means = runtime.training_group.mean(torch.stack(list(observed.values())))
            objective.remember(progress.memory, dict(zip(observed, means, strict=True)))
        for piece_terms in terms:
            scalars.add(piece_terms)
        scalars.add({f"gradient_norm/{active.name}": torch.tensor(update.norm)})
    else:
        for buffer, old in zip(kept, before, strict=True):
            buffer.copy_(old)
    return update


def _floating_buffers(*players: Player) -> list[Tensor]:
    """Running statistics that a bad batch would poison."""
    return [b for player in players for b in player.module.buffers() if b.is_floating_point()]


def _pieces(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch in micro-batches of fresh samples, in slot order."""
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
