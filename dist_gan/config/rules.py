"""Rules that join settings of several sections."""

from __future__ import annotations

from dist_gan import urls
from dist_gan.config import DCGANNetworks, MLPNetworks, PointsData, Ramp, RunConfig, ShapesData, ShardsData
from dist_gan.config.values import same_folder
from dist_gan.mistakes import UserError
from dist_gan.wording import redact, scheme_of, shown

KNOBS = (
    "g_lr", "d_lr", "g_beta2", "d_beta2", "r1_gamma", "r2_gamma", "gradient_penalty", "instance_noise", "ema_half_life",
)  # fmt: skip
"""Names, as logged, of the settings that may change during training."""


def cross_field_mistakes(config: RunConfig, world_size: int) -> list[tuple[tuple[str, ...], str]]:
    """Mistakes across sections: the names of the settings involved, and a sentence."""
    found: list[tuple[tuple[str, ...], str]] = []
    run, data, networks, objective = config.run, config.data, config.networks, config.objective
    batch, micro = run.batch, config.runtime.micro_batch
    if batch % world_size:
        found.append(
            (
                ("run.batch",),
                f"run.batch: {batch} images do not divide over {world_size} processes; "
                f"take {_nearest_multiple(batch, world_size)}, or start another number of processes",
            )
        )
    elif micro is not None and (batch // world_size) % micro:
        found.append(
            (
                ("run.batch", "runtime.micro_batch"),
                f"runtime.micro_batch: {batch // world_size} images a process do not divide into pieces of {micro}; "
                f"choose a divisor of {batch // world_size}",
            )
        )
    points = isinstance(data, PointsData)
    if points != isinstance(networks, MLPNetworks):
        found.append(
            (
                ("data", "networks.kind"),
                f"networks.kind: {networks.kind!r} does not fit data.kind {data.kind!r}; "
                f"points go with mlp, images with article or dcgan",
            )
        )
    if isinstance(data, ShapesData) and not points and not isinstance(networks, MLPNetworks):
        if (networks.resolution, networks.channels) != (32, 3):
            found.append(
                (
                    ("data", "networks.resolution", "networks.channels"),
                    f"networks.resolution: {networks.resolution} with {networks.channels} channels, but the embedded "
                    f"shapes are 32x32 in colour; set networks.resolution=32 networks.channels=3",
                )
            )
        if networks.classes not in (0, 12):
            found.append(
                (
                    ("data", "networks.classes"),
                    f"networks.classes: {networks.classes}, but the embedded shapes have 12 classes; take 12, or 0 for none",
                )
            )
    if isinstance(data, PointsData) and networks.classes not in (0, data.modes):
        found.append(
            (
                ("data.modes", "networks.classes"),
                f"networks.classes: {networks.classes}, but the points have {data.modes} classes; take that, or 0 for none",
            )
        )
    if not isinstance(data, PointsData) and data.lanes < world_size:
        found.append(
            (
                ("data.lanes",),
                f"data.lanes: {data.lanes} lanes cannot be dealt to {world_size} processes; take a multiple of {world_size}",
            )
        )
    if isinstance(data, ShardsData):
        for place, url in [("data.url", data.url), *(("data.mix", url) for url in data.mix)]:
            try:
                urls.check_url(url, place=place)
            except UserError as error:
                found.append(((place,), str(error)))
        if same_folder(data.url) in map(same_folder, data.mix):
            found.append((("data.mix",), f"data.mix: {redact(data.url)!r} is data.url too; give it data.weight"))
        is_remote = any(urls.local_path(url) is None for url in data.sources)
        if is_remote and data.patience_s >= config.runtime.step_timeout_s:
            found.append(
                (
                    ("data.patience_s", "runtime.step_timeout_s"),
                    f"data.patience_s: {data.patience_s} s, but a rank that does nothing for "
                    f"runtime.step_timeout_s={config.runtime.step_timeout_s} is taken for dead; be less patient with stores, or "
                    f"more with ranks",
                )
            )
        if data.disk_cache and scheme_of(data.disk_cache) != "file":
            found.append(
                (
                    ("data.disk_cache",),
                    f"data.disk_cache: {redact(data.disk_cache)!r} is no local folder; give a path on a disk",
                )
            )
        elif redact(data.disk_cache) != data.disk_cache:
            found.append((("data.disk_cache",), f"data.disk_cache: {redact(data.disk_cache)!r} {urls.HAS_SECRET}"))
    if not run.dir or scheme_of(run.dir) != "file":
        found.append(
            (
                ("run.dir",),
                f"run.dir: {redact(run.dir)!r} is no local folder; logs are appended to, so give a path on a disk",
            )
        )
    starts = {
        "run.dir": run.dir if scheme_of(run.dir) == "file" else None,
        "run.resume": None if run.resume in ("auto", "never") else run.resume,
        "run.init_from": run.init_from,
    }
    for place, start in starts.items():
        if start is not None:
            try:
                urls.check_url(start, place=place)
            except UserError as error:
                found.append(((place,), str(error)))
    if config.checkpoint.keep_best is not None:
        name, names = config.checkpoint.keep_best.removeprefix("-"), logged_scalars(config)
        if name not in names:
            found.append(
                (
                    ("checkpoint.keep_best", "objective"),
                    f"checkpoint.keep_best: {shown(config.checkpoint.keep_best)} names no scalar that this run logs before "
                    f"a checkpoint; choose one of {', '.join(names)} (a - before it keeps the highest)",
                )
            )
    penalised = any(k != 0.0 for k in (objective.r1_gamma, objective.r2_gamma, objective.gradient_penalty))
    if penalised and isinstance(networks, DCGANNetworks) and networks.d_norm == "batch":
        found.append(
            (
                ("objective", "networks.d_norm"),
                "networks.d_norm: 'batch' mixes the images of a batch, so the gradient penalties of the objective would not "
                "be of each image; set networks.d_norm=none, or the penalties to 0",
            )
        )
    if objective.label_smoothing and objective.kind not in ("minimax", "nonsaturating"):
        found.append(
            (
                ("objective.label_smoothing", "objective.kind"),
                f"objective.label_smoothing: {objective.label_smoothing} has no effect with {objective.kind!r}, which has no "
                f"labels; set it to 0, or take minimax or nonsaturating",
            )
        )
    if objective.penalty_every > 1 and not penalised:
        found.append(
            (
                ("objective",),
                f"objective.penalty_every: {objective.penalty_every} has no effect without a penalty; set r1_gamma, "
                f"r2_gamma or gradient_penalty",
            )
        )
    return found


def logged_scalars(config: RunConfig) -> tuple[str, ...]:
    """Names of the scalars reduced over ranks and logged with a checkpoint: the choices of `checkpoint.keep_best`.

    No checkpoint has timings (`time/...`), which one rank measures, or the modes of the embedded data set
    (`metric/...`), which are counted after the run has ended.
    """
    objective = config.objective
    penalties = {
        "penalty/r1": objective.r1_gamma,
        "penalty/r2": objective.r2_gamma,
        "penalty/gradient_penalty": objective.gradient_penalty,
        "penalty/lecam": objective.lecam,
    }
    return (
        "loss/discriminator",
        "loss/generator",
        "logits/real",
        "logits/fake",
        "logits/real_positive",
        "logits/generated",
        *(name for name, weight in penalties.items() if _is_ever_positive(weight)),
        "gradient_norm/discriminator",
        "gradient_norm/generator",
        "skipped/discriminator",
        "skipped/generator",
        "recovery/rollbacks",
        "data/damaged",
        *(f"knobs/{name}" for name in KNOBS),
    )


def _is_ever_positive(knob: float | Ramp) -> bool:
    return knob.start > 0 or knob.end > 0 if isinstance(knob, Ramp) else knob > 0


def _nearest_multiple(value: int, divisor: int) -> int:
    return max(divisor, round(value / divisor) * divisor)
