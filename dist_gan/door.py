"""`dist_gan.train`: a run with parts of the user's own script."""

from __future__ import annotations

from collections.abc import Sequence

from dist_gan.__main__ import main
from dist_gan.config import RunConfig
from dist_gan.data import Stage
from dist_gan.metrics import Metric
from dist_gan.models.own import OwnBuilder
from dist_gan.objectives import AdversarialObjective
from dist_gan.own_parts import ObjectiveBuilder, OwnParts
from dist_gan.process.life import run


def train(
    config: RunConfig | Sequence[str],
    *,
    networks: OwnBuilder | None = None,
    objective: ObjectiveBuilder = AdversarialObjective,
    stages: Sequence[Stage] = (),
    metrics: Sequence[Metric] = (),
) -> int:
    """Trains, with parts of the calling script; returns the exit code of `train.py`, for `sys.exit`.

    Start the script as `train.py` is started: `accelerate launch my_train.py RECIPE.yaml section.key=value`. All ranks
    have to run the same script. The same command again resumes.

    Args:
        config: settings, or the command line as a list: `sys.argv[1:]`.
        networks: function of the section `networks` (kind `own`) that returns (generator, discriminator). A generator
            maps (latents_BZ, labels_B) to images_BCHW in [-1, 1], a discriminator (images_BCHW, labels_B) to logits_B;
            labels are None without classes. Its weights come from torch's global generator, which is seeded.
        objective: builder of the losses, called as `objective(section, latent_dim=..., penalties_apart=...)`: a
            subclass of `AdversarialObjective`, or a function that returns an `Objective`.
        stages: steps between decoding and batching, generators over samples.
        metrics: metrics of the averaged generator, logged as `metric/...`.
    """
    own = OwnParts(networks, objective, tuple(stages), tuple(metrics))
    if isinstance(config, RunConfig):
        return run(config, own=own)
    return main(config, own=own)
