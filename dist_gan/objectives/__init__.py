"""The game: what each player minimises. Pure: no optimizer, no device, no rank, and never a call of backward."""

from dist_gan.objectives.adversarial import AdversarialObjective, Objective

__all__ = ["AdversarialObjective", "Objective"]
