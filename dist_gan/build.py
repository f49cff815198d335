"""Construction of a run: all of its parts, built in a fixed order, into which the newest checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_gan import __version__
from dist_gan.attempts import note_start
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import DataOrder, PointsData, RunConfig
from dist_gan.config.reader import config_hash, to_yaml
from dist_gan.data import ImageStream, PointStream, ShardFolder, Stage, Stream
from dist_gan.data.manifest import read_manifest
from dist_gan.draws import Draws
from dist_gan.ema import GeneratorEMA
from dist_gan.health.monitor import Detector
from dist_gan.health.recovery import Recovery
from dist_gan.metrics import Metric, Samples
from dist_gan.metrics.modes import mode_count
from dist_gan.models import build_networks, picture_networks
from dist_gan.objectives import AdversarialObjective
from dist_gan.own_parts import NO_PARTS, ObjectiveBuilder, OwnParts
from dist_gan.report import Report
from dist_gan.resume import resume
from dist_gan.run_data import data_sources
from dist_gan.run_folder import LOGS, checkpoints_of
from dist_gan.run_mirror import RunMirror
from dist_gan.runtime import Runtime, StopRequest
from dist_gan.saving import Saving
from dist_gan.state import Progress, TrainState
from dist_gan.step import Game, Rules
from dist_gan.tracker import Tracker
from dist_gan.types import Networks, UserError


class Run(NamedTuple):
    """All parts of a run, after the newest checkpoint was loaded into them."""

    config: RunConfig
    game: Game
    saving: Saving
    report: Report
    stop: StopRequest
    metrics: tuple[Metric, ...]
    """Metrics of the averaged generator, whose values are logged as `metric/...`."""
    measures: tuple[Metric, ...]
    """Measurements of the run's health, whose values are logged as `health/...`."""
    detectors: tuple[Detector, ...]
    """Detectors, which examine the logged scalars for a failure of the training."""

    @property
    def state(self) -> TrainState:
        """State of the run: everything that a checkpoint stores."""
        return self.game.state

    def samples(self) -> Samples:
        """Returns a source of samples of the present averaged generator, for metrics."""
        game, classes = self.game, self.config.networks.classes
        return Samples(game.state.ema.module, game.draws, game.runtime, classes, game.state.progress.images)

    def close(self) -> None:
        """Closes the log files, and ends the threads that read images ahead."""
        self.report.tracker.close()
        self.state.stream.close()


def build(
    config: RunConfig,
    runtime: Runtime,
    stop: StopRequest,
    *,
    attempt: int,
    mirror: RunMirror | None = None,
    own: OwnParts = NO_PARTS,
    measures: Sequence[Metric] = (),
    detectors: Sequence[Detector] = (),
) -> Run:
    """Builds every part of a run in a fixed order, and loads the newest checkpoint into them. Collective.

    Args:
        config: every setting.
        runtime: this process and its process groups.
        stop: stop request, which a signal sets.
        attempt: number of this start of the run.
        mirror: copies of the run's files beside the checkpoints, on rank 0 of a run with `checkpoint.url`; else None.
        own: parts of the user's own script.
        measures: measurements of the run's health.
        detectors: detectors of failures in the logged scalars; the run is rolled back when one finds a failure.

    Raises:
        UserError: data, checkpoint and configuration do not belong together.
    """
    draws = Draws(config.run.seed, device=runtime.device, dtype=runtime.dtype)
    pair = build_networks(config.networks, seed=draws.seed_for("weights", draw=0, rank=0), own=own.networks)
    sources = _sources(config)
    stream = _stream(config, runtime, draws, sources, own.stages)
    game = new_game(config, runtime, pair, stream, draws, objective=own.objective)
    state = game.state
    folder = Path(config.run.dir)
    found = own.script()
    script = None if found is None else found._asdict()
    checkpointer = Checkpointer(
        checkpoints_of(config),
        runtime=runtime,
        section=config.checkpoint,
        facts={
            "dist_gan": __version__,
            "attempt": attempt,
            "config_hash": config_hash(config),
            "config": to_yaml(config),
            "gradient_layout": {player.name: player.layout for player in (state.generator, state.discriminator)},
            "classes": _class_names(config, sources),
        }
        | ({} if script is None else {"script": script}),
        logs=[folder / name for name in LOGS],
        mirror=mirror,
    )
    resumed = resume(config, checkpointer, state, script=script)
    images, limit = state.progress.images, config.recovery.max_restarts
    runtime.control_group.agree(
        note_start(folder, attempt=attempt, images=images, limit=limit) if runtime.is_main else None
    )
    tracker = Tracker(
        folder,
        enabled=runtime.is_main,
        attempt=attempt,
        total=config.run.images,
        resumed_at=images,
        config_yaml=to_yaml(config),
    )
    if mirror is not None:
        mirror.push()  # so that other machines count failed attempts, too
    report = Report(tracker, runtime, state)
    report.started(resumed, attempt=attempt, config_hash=config_hash(config))
    saving = Saving(checkpointer, runtime, state, report)
    if resumed.finished_rollback:
        saving.commit_rollback()
    every_metric = (*_metrics_of_data(config), *own.metrics)
    return Run(config, game, saving, report, stop, every_metric, tuple(measures), tuple(detectors))


def new_game(
    config: RunConfig,
    runtime: Runtime,
    networks: Networks,
    stream: Stream,
    draws: Draws,
    *,
    objective: ObjectiveBuilder = AdversarialObjective,
) -> Game:
    """Builds the parts of a training step, as they are before the first image.

    Args:
        config: every setting.
        runtime: this process and its process groups.
        networks: generator and discriminator, which are wrapped for training and must not be used afterwards.
        stream: real images.
        draws: random numbers of the run.
        objective: function that builds the losses.
    """
    # The average is copied before the networks are wrapped, since ZeRO stage 3 partitions their weights.
    ema = GeneratorEMA(networks.generator, device=runtime.device, dtype=runtime.dtype)
    generator, discriminator = runtime.players(networks, g_optim=config.g_optim, d_optim=config.d_optim)
    losses = objective(
        config.objective, latent_dim=config.networks.latent_dim, penalties_apart=runtime.precision == "bf16"
    )
    rules = Rules(
        batch=config.run.batch,
        d_updates=config.run.d_updates,
        micro_batch=config.runtime.micro_batch,
        penalty_every=config.objective.penalty_every,
        fresh_batch_for_g=losses.needs_real_in_g_turn and not config.objective.shared_batch,
    )
    memory = losses.initial_memory(runtime.device, runtime.dtype)
    state = TrainState(generator, discriminator, ema, memory, stream, Progress(), Recovery(config.recovery))
    return Game(runtime, state, losses, draws, rules)


def _metrics_of_data(config: RunConfig) -> tuple[Metric, ...]:
    """Returns the metrics that belong to the data set: of the embedded data set, modes are counted at the run's end."""
    return (mode_count(every=config.run.images),) if config.data.num_drawn else ()


def _sources(config: RunConfig) -> list[tuple[ShardFolder, int]]:
    """Returns the sources of the run's images with their mixing weights; an empty list if the data are points."""
    if config.data.makes == "points":
        return []
    return [(ShardFolder(url, read_manifest(url)), weight) for url, weight in data_sources(config).items()]


def _class_names(config: RunConfig, sources: Sequence[tuple[ShardFolder, int]]) -> list[str] | None:
    """Returns the class names, recorded for later sampling; None without classes, or if the sources' names differ."""
    names = {source.manifest.classes for source, _ in sources if config.networks.classes}
    found = names.pop() if len(names) == 1 else None
    return None if found is None else list(found)


def _stream(
    config: RunConfig,
    runtime: Runtime,
    draws: Draws,
    sources: Sequence[tuple[ShardFolder, int]],
    stages: Sequence[Stage],
) -> Stream:
    slots, classes = runtime.slots(config.run.batch), config.networks.classes
    if isinstance(config.data, DataOrder):
        networks = picture_networks(config.networks)
        return ImageStream(
            sources,
            section=config.data,
            resolution=networks.resolution,
            channels=networks.channels,
            classes=classes,
            batch=config.run.batch,
            slots=slots,
            draws=draws,
            stages=stages,
        )
    if isinstance(config.data, PointsData):
        return PointStream(config.data, classes=classes, slots=slots, draws=draws)
    raise UserError(f"data.kind: {config.data.kind!r} has no stream in this version")
