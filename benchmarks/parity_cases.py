"""The settings that are compared between strategies and numbers of processes."""

from __future__ import annotations

from typing import Any, Literal

from dist_gan.config import (
    AdamSection,
    CheckpointSection,
    DCGANNetworks,
    EMASection,
    ObjectiveSection,
    RunConfig,
    RunSection,
    RuntimeSection,
    SGDSection,
    ShardsData,
)
from dist_gan.objectives.losses import LOSSES

PENALTIES: dict[str, dict[str, float]] = {
    "none": {},
    "r1": {"r1_gamma": 1.0},
    "r2": {"r2_gamma": 1.0},
    "r1+r2": {"r1_gamma": 1.0, "r2_gamma": 1.0},
    "wgan-gp": {"gradient_penalty": 10.0},
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": True},
    "lazy": {"penalty_every": 4},
    "several": {"d_updates": 3},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "clipping": {"optim": AdamSection(lr=2e-3, clip=0.1)},
    "sgd": {"optim": SGDSection(lr=0.01, momentum=0.9)},
    "adamw": {"optim": AdamSection(kind="adamw", lr=2e-3, weight_decay=0.1)},
    "conditional": {"classes": 5, "r1_gamma": 1.0},
    "instance noise": {"instance_noise": 0.2},
    "memory": {"lecam": 0.3},
    "shared batch": {"shared_batch": True},
    "spectral": {"d_norm": "spectral", "r1_gamma": 1.0},
    "synchronised batch norm": {"g_norm": "batch", "d_norm": "batch", "sync_batchnorm": True, "r1_gamma": 0.1},
}
STEPS, BATCH = 20, 64


def one_case(
    shards: str,
    *,
    world_size: int,
    loss: str = "relativistic",
    accumulate: bool = False,
    precision: Literal["fp32", "fp64", "bf16"] = "fp64",
    batch: int = BATCH,
    steps: int = STEPS,
    **changes: Any,
) -> RunConfig:
    """A run of `steps` steps of a small convolutional pair."""
    objective = {k: v for k, v in changes.items() if k in ObjectiveSection.model_fields}
    optim = changes.get("optim", AdamSection(lr=2e-3, beta1=0.5, beta2=0.99))
    d_updates = changes.get("d_updates", 1)
    return RunConfig(
        run=RunSection(images=steps * batch * d_updates, batch=batch, d_updates=d_updates, seed=7),
        data=ShardsData(url=shards, lanes=16, block=16, flip=True),
        networks=DCGANNetworks(
            resolution=16, latent_dim=16, g_width=4, d_width=4, classes=changes.get("classes", 0),
            g_norm=changes.get("g_norm", "none"), d_norm=changes.get("d_norm", "none"),
        ),
        objective=ObjectiveSection(kind=loss, **objective),
        g_optim=optim,
        d_optim=optim,
        ema=EMASection(half_life=500, warmup=0),
        runtime=RuntimeSection(
            precision=precision, threads=1, micro_batch=batch // world_size // 2 if accumulate else None,
            sync_batchnorm=changes.get("sync_batchnorm", False),
        ),
        checkpoint=CheckpointSection(every=10**9),
    )  # fmt: skip


def of_steps(config: RunConfig, steps: int) -> RunConfig:
    """The same run, of another number of steps."""
    images = steps * config.run.batch * config.run.d_updates
    return config.model_copy(update={"run": config.run.model_copy(update={"images": images})})


def loss_cases(shards: str, *, world_size: int) -> dict[str, RunConfig]:
    """In float64, every loss with every penalty, plain and accumulated; and what else changes an update."""
    found = {}
    for loss in LOSSES:
        for penalty, settings in PENALTIES.items():
            for accumulate in (False, True):
                name = f"{loss}/{penalty}/{'accumulated' if accumulate else 'plain'}"
                found[name] = one_case(shards, loss=loss, accumulate=accumulate, world_size=world_size, **settings)
    extra = EXTRAS | {
        "lazy": {"r1_gamma": 1.0, "r2_gamma": 1.0, "penalty_every": 4},
        "several discriminator updates": {"d_updates": 3, "r1_gamma": 1.0},
    }
    for name, settings in extra.items():
        for accumulate in (False, True):
            if accumulate and name == "synchronised batch norm":
                continue  # a micro-batch is normalised by itself
            found[f"{name}/{'accumulated' if accumulate else 'plain'}"] = one_case(
                shards, accumulate=accumulate, world_size=world_size, **settings
            )
    return found


def strategy_cases(shards: str, *, world_size: int, precision: Literal["fp32", "fp64", "bf16"]) -> dict[str, RunConfig]:
    """Every penalty in every mode, under a loss that gives every parameter a gradient; and what else there is."""
    found = {
        f"{penalty}/{mode}": one_case(
            shards, loss="nonsaturating", world_size=world_size, precision=precision, **settings, **how
        )
        for penalty, settings in PENALTIES.items()
        for mode, how in MODES.items()
        if not (penalty == "none" and mode == "lazy")
    }
    for name, settings in EXTRAS.items():
        found[name] = one_case(shards, loss="nonsaturating", world_size=world_size, precision=precision, **settings)
    return found
