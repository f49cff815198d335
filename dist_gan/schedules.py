"""Schedules: values of settings as functions of the number of images seen."""

from __future__ import annotations

import math

from dist_gan.config.sections import RunConfig
from dist_gan.config.values import Ramp
from dist_gan.objectives.penalties import PENALTIES
from dist_gan.types import Knobs


def at(knob: float | Ramp, images: int) -> float:
    """Returns the value of a number or ramp when `images` have been seen.

    The cosine is v(n) = end + (start - end) (1 + cos(pi n / N)) / 2 (R3GAN, Huang et al. 2024), constant after N; with
    `begin`, n and N count from `begin`.
    """
    if not isinstance(knob, Ramp):
        return float(knob)
    progress = min(max(images - knob.begin, 0) / (knob.images - knob.begin), 1.0)
    weight = 1.0 - progress if knob.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return knob.end + (knob.start - knob.end) * weight


def knobs_at(images: int, *, config: RunConfig) -> Knobs:
    """Returns the value of every scheduled setting when `images` have been seen."""
    g_optim, d_optim, objective = config.g_optim, config.d_optim, config.objective
    half_life = at(config.ema.half_life, images)
    if config.ema.warmup:
        half_life = min(half_life, config.ema.warmup * images)
    return Knobs(
        g_lr=at(g_optim.lr, images),
        d_lr=at(d_optim.lr, images),
        g_beta2=at(g_optim.beta2, images),
        d_beta2=at(d_optim.beta2, images),
        r1_gamma=at(objective.r1_gamma, images),
        r2_gamma=at(objective.r2_gamma, images),
        gradient_penalty=at(objective.gradient_penalty, images),
        instance_noise=at(objective.instance_noise, images),
        ema_half_life=half_life,
    )


def lazily(knobs: Knobs, *, update: int, every: int) -> Knobs:
    """Returns the settings of one discriminator update, whose penalties are `every` times as strong or, between, 0.

    Penalties are applied at every `every`-th update (lazy regularisation; Karras et al. 2020, StyleGAN2, appendix B),
    so that their mean strength stays the same.
    """
    factor = every if update % every == 0 else 0
    return knobs._replace(**{name: getattr(knobs, name) * factor for name in PENALTIES})
