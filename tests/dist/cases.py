"""The settings that are compared between numbers of processes."""

from __future__ import annotations

from dist_gan.config import (
    AdamSection,
    CheckpointSection,
    DCGANNetworks,
    ObjectiveSection,
    RunConfig,
    RunSection,
    RuntimeSection,
    SGDSection,
    ShardsData,
)

LOSSES = ("minimax", "nonsaturating", "hinge", "least_squares", "wasserstein", "relativistic")
PENALTIES = {
    "none": {},
    "r1": {"r1_gamma": 1.0},
    "r2": {"r2_gamma": 1.0},
    "r1+r2": {"r1_gamma": 1.0, "r2_gamma": 1.0},
    "wgan-gp": {"gradient_penalty": 10.0},
}
STEPS, BATCH = 20, 64


def _case(shards: str, *, loss: str = "relativistic", accumulate: bool = False, world_size: int, **changes) -> RunConfig:
    objective = {k: v for k, v in changes.items() if k in ObjectiveSection.model_fields}
    optim = changes.get("optim", AdamSection(lr=2e-3, beta1=0.5, beta2=0.99))
    d_updates = changes.get("d_updates", 1)
    return RunConfig(
        run=RunSection(images=STEPS * BATCH * d_updates, batch=BATCH, d_updates=d_updates, seed=7),
        data=ShardsData(url=shards, lanes=16, block=16, flip=True),
        networks=DCGANNetworks(
            resolution=16, latent_dim=16, g_width=4, d_width=4, g_norm="none", d_norm="none",
            classes=changes.get("classes", 0),
        ),
        objective=ObjectiveSection(kind=loss, **objective),
        g_optim=optim,
        d_optim=optim,
        runtime=RuntimeSection(
            precision="fp64", threads=1, micro_batch=BATCH // world_size // 2 if accumulate else None
        ),
        checkpoint=CheckpointSection(every=10**9),
    )  # fmt: skip


def cases(shards: str, *, world_size: int) -> dict[str, RunConfig]:
    """Every loss with every penalty, plain and accumulated; and what else changes an update."""
    found = {}
    for loss in LOSSES:
        for penalty, settings in PENALTIES.items():
            for accumulate in (False, True):
                name = f"{loss}/{penalty}/{'accumulated' if accumulate else 'plain'}"
                found[name] = _case(shards, loss=loss, accumulate=accumulate, world_size=world_size, **settings)
    extra = {
        "lazy": {"r1_gamma": 1.0, "r2_gamma": 1.0, "penalty_every": 4},
        "several discriminator updates": {"d_updates": 3, "r1_gamma": 1.0},
        "clipping": {"optim": AdamSection(lr=2e-3, clip=0.1)},
        "sgd": {"optim": SGDSection(lr=0.05, momentum=0.9)},
        "adamw": {"optim": AdamSection(kind="adamw", lr=2e-3, weight_decay=0.1)},
        "conditional": {"classes": 5, "r1_gamma": 1.0},
        "instance noise": {"instance_noise": 0.2},
        "memory": {"lecam": 0.3},
        "shared batch": {"shared_batch": True},
    }
    for name, settings in extra.items():
        for accumulate in (False, True):
            found[f"{name}/{'accumulated' if accumulate else 'plain'}"] = _case(
                shards, accumulate=accumulate, world_size=world_size, **settings
            )
    return found
