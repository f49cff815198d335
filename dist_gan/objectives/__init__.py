"""Adversarial game of two players, the discriminator and the generator: the loss that each player minimises.

The functions are pure: they know no optimizer, no device and no rank, and never call `backward`.
"""

from dist_gan.objectives.adversarial import AdversarialObjective, Objective

__all__ = ["AdversarialObjective", "Objective"]
