"""Builds the parts of a run in a fixed order, and runs the loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_gan import __version__, storage
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import DataOrder, PointsData, RunConfig
from dist_gan.config.reader import config_hash, to_yaml
from dist_gan.data import Damage, ImageStream, PointStream, Source, Stage, Stream
from dist_gan.data.manifest import read_manifest
from dist_gan.draws import Draws
from dist_gan.ema import GeneratorEMA
from dist_gan.evaluate import count_modes, fixed_grid, to_pictures
from dist_gan.health.recovery import PLAYERS, Recovery, actions
from dist_gan.models import build_networks, picture_networks
from dist_gan.objectives import AdversarialObjective
from dist_gan.resume import resume, roll_back
from dist_gan.run_data import data_sources
from dist_gan.run_folder import LOGS, note_start
from dist_gan.runtime import Fingerprints, Runtime, StopRequest, Update
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.state import Progress, TrainState
from dist_gan.step import Rules, train_step
from dist_gan.tracker import Tracker, profiled
from dist_gan.types import Networks, Scalars, TrainingFailed

MODE_SAMPLES = 5_000
"""Samples that the modes of the embedded data set are counted in."""


DAMAGE_SHOWN = 10
"""Damaged images that a line is printed for at a time; events.jsonl has them all, and data.max_bad limits them."""


class Run(NamedTuple):
    """The parts of a run, built and resumed."""

    config: RunConfig
    runtime: Runtime
    state: TrainState
    objective: AdversarialObjective
    draws: Draws
    rules: Rules
    checkpointer: Checkpointer
    tracker: Tracker
    stop: StopRequest
    healthy_next: list[str]
    """The last checkpoint, if nothing was wrong when it was taken: healthy if nothing is until the next one."""


class End(NamedTuple):
    """Result of a run that did not fail."""

    images: int
    stopped_by: str | None
    """The signal that asked it to stop; None if it finished."""
    commit: str | None
    """URL of its last checkpoint."""


def build(config: RunConfig, runtime: Runtime, stop: StopRequest, *, attempt: int, stages: Sequence[Stage] = ()) -> Run:
    """Makes every part, in the order of the house, and puts the newest checkpoint into them.

    Raises:
        UserError: data, checkpoint and configuration do not belong together.
    """
    draws = Draws(config.run.seed, device=runtime.device, dtype=runtime.dtype)
    networks = build_networks(config.networks, seed=draws.seed_for("weights", draw=0, rank=0))
    sources = _sources(config)
    state, objective, rules = new_state(config, runtime, networks, _stream(config, runtime, draws, sources, stages))
    checkpointer = Checkpointer(
        storage.join(config.run.dir, "checkpoints"),
        runtime=runtime,
        section=config.checkpoint,
        facts={
            "dist_gan": __version__,
            "attempt": attempt,
            "config_hash": config_hash(config),
            "config": to_yaml(config),
            "gradient_layout": {player.name: player.layout for player in (state.generator, state.discriminator)},
            "classes": _class_names(config, sources),
        },
        logs=[Path(config.run.dir) / name for name in LOGS],
    )
    resumed = resume(config, checkpointer, state)
    images = state.progress.images
    folder, limit = Path(config.run.dir), config.recovery.max_restarts
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
    for text in resumed.notes:
        tracker.say(text)
    start = f"resumed from {resumed.url} at {images:,} images" if resumed.url else "from scratch"
    tracker.say(f"attempt {attempt}: {start}; {runtime.summary}")
    tracker.event(
        "resume" if resumed.url else "start",
        images=images,
        checkpoint=resumed.url,
        notes=resumed.notes,
        config_hash=config_hash(config),
        **runtime.describe(),
    )
    run = Run(config, runtime, state, objective, draws, rules, checkpointer, tracker, stop, healthy_next=[])
    if resumed.finished_rollback:
        _commit_rollback(run)
    return run


def new_state(
    config: RunConfig, runtime: Runtime, networks: Networks, stream: Stream
) -> tuple[TrainState, AdversarialObjective, Rules]:
    """Everything that learns, as it is before the first image; the networks become the players'."""
    # Before the players: ZeRO's third stage takes the networks apart.
    ema = GeneratorEMA(networks.generator, device=runtime.device, dtype=runtime.dtype)
    generator, discriminator = runtime.players(networks, g_optim=config.g_optim, d_optim=config.d_optim)
    objective = AdversarialObjective(
        config.objective, latent_dim=config.networks.latent_dim, penalties_apart=runtime.precision == "bf16"
    )
    rules = Rules(
        batch=config.run.batch,
        d_updates=config.run.d_updates,
        micro_batch=config.runtime.micro_batch,
        penalty_every=config.objective.penalty_every,
        fresh_batch_for_g=objective.needs_real_in_g_turn and not config.objective.shared_batch,
    )
    progress = Progress(memory=objective.initial_memory(runtime.device, runtime.dtype))
    state = TrainState(generator, discriminator, ema, stream, progress, Recovery(config.recovery))
    return state, objective, rules


def _sources(config: RunConfig) -> list[tuple[Source, int]]:
    """Sources of the run's images with their mixing weights; empty if the data are points."""
    if config.data.makes == "points":
        return []
    return [(Source(url, read_manifest(url)), weight) for url, weight in data_sources(config).items()]


def _class_names(config: RunConfig, sources: Sequence[tuple[Source, int]]) -> list[str] | None:
    """Class names, recorded for later sampling; None without classes, or if the folders have different names."""
    names = {source.manifest.classes for source, _ in sources if config.networks.classes}
    found = names.pop() if len(names) == 1 else None
    return None if found is None else list(found)


def _stream(
    config: RunConfig,
    runtime: Runtime,
    draws: Draws,
    sources: Sequence[tuple[Source, int]],
    stages: Sequence[Stage],
) -> Stream:
    slots, classes = runtime.slots(config.run.batch), config.networks.classes
    if isinstance(config.data, PointsData):
        return PointStream(config.data, classes=classes, slots=slots, draws=draws)
    assert isinstance(config.data, DataOrder)
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


def fit(run: Run) -> End:
    """The loop: trains until `run.images` have been seen, or until some rank is asked to stop.

    Raises:
        TrainingFailed: the gradients stay not finite, the replicas differ, data cannot be read or files not written.
    """
    config, runtime, state, tracker = run.config, run.runtime, run.state, run.tracker
    progress, total = state.progress, config.run.images
    scalars, clock, shown = ScalarMeans(), Clock(progress, state.stream), {}
    if progress.images == 0:
        tracker.grid("real", 0, to_pictures(state.stream.preview(config.log.samples)))
    with profiled(tracker.folder / "tensorboard", enabled=config.run.profile and runtime.is_main) as step_done:
        while progress.images < total:
            before = progress.images
            knobs = knobs_at(before, config=config)
            updates = train_step(runtime, state, run.objective, run.draws, knobs, scalars, rules=run.rules)
            if _recover(run, updates):
                scalars, clock = ScalarMeans(), Clock(progress, state.stream)
                continue
            if clock.first_step():
                runtime.shorten_timeout()
            step_done()

            now = progress.images
            if config.runtime.compare_every and _due(before, now, config.runtime.compare_every, total):
                _compare_replicas(run)
            if _due(before, now, config.log.every, total) or _due(before, now, config.checkpoint.every, total):
                _report_damage(run)
                shown = scalars.flush(runtime) | _counters(state) | _moving(knobs._asdict())
                timing = clock.tick(runtime)
                tracker.scalars(now, shown, clock=timing)
                tracker.progress(now, shown, clock=timing)
            if _due(before, now, config.log.samples_every, total):
                _grid(run)
            asked = _asked_to_stop(run, before)
            if asked or _due(before, now, config.checkpoint.every, total):
                _save(run, shown)
            if asked and now < total:
                return _leave(run, asked)
            _report_written(run)
    return _finish(run)


class Clock:
    """Timing of the training loop, on this rank."""

    def __init__(self, progress: Progress, stream: Stream) -> None:
        self._progress, self._stream = progress, stream
        self._images, self._since, self._waited = progress.images, time.perf_counter(), stream.waited_s
        self._steps = 0

    def first_step(self) -> bool:
        """True if the latest step was the first of this process."""
        self._steps += 1
        return self._steps == 1

    def tick(self, runtime: Runtime) -> Scalars:
        """Timing since the last tick; adds it to the run's seconds."""
        now, images, waited = time.perf_counter(), self._progress.images, self._stream.waited_s
        seconds = now - self._since
        self._progress.seconds += seconds
        values = {
            "time/seconds": self._progress.seconds,
            "time/images_per_second": (images - self._images) / seconds,
            "time/data_wait_share": (waited - self._waited) / seconds,
            "time/peak_memory_gib": runtime.peak_memory_bytes() / 2**30,
            "data/retries": float(self._stream.retries),
        }
        self._images, self._since, self._waited = images, now, waited
        return values


def _due(before: int, now: int, every: int, total: int) -> bool:
    """True if an interval ended in this step, or the run did."""
    return before // every != now // every or now >= total


def _counters(state: TrainState) -> Scalars:
    recovery = state.recovery
    skipped = {f"skipped/{name}": float(count) for name, count in recovery.skipped.items()}
    data = {"data/damaged": float(state.stream.num_damaged)}
    return skipped | {"recovery/rollbacks": float(recovery.rollbacks)} | data


def _moving(knobs: Scalars) -> Scalars:
    return {f"knobs/{name}": value for name, value in knobs.items()}


def _recover(run: Run, updates: list[Update]) -> bool:
    """Reports skipped updates, and does what recovery decides; whether the run has gone back."""
    tracker, progress, recovery = run.tracker, run.state.progress, run.state.recovery
    action = actions(recovery, updates)
    for player, update in zip([PLAYERS[0]] * (len(updates) - 1) + [PLAYERS[1]], updates, strict=True):
        count = recovery.skipped[player]
        if not update.applied and count & (count - 1) == 0:
            tracker.say(f"skipped an update of the {player}: the gradient of {update.culprit} is not finite")
            tracker.event("skipped_update", images=progress.images, player=player, tensor=update.culprit, skipped=count)
    if action.kind == "continue":
        return False
    tracker.event("failure", images=progress.images, phenomenon="nonfinite", reason=action.reason)
    reason = f"training failed at {progress.images:,} images: {action.reason}"
    if action.kind == "stop":
        raise TrainingFailed(reason)
    failed_at = progress.images
    target = roll_back(run.checkpointer, run.state, reason=reason)
    tracker.rewind(progress.images)
    tracker.say(f"{action.reason}; back from {failed_at:,} to {progress.images:,} images, the healthy {target}")
    tracker.event(
        "rollback", images=progress.images, failed_at=failed_at, checkpoint=target, rollbacks=recovery.rollbacks
    )
    _commit_rollback(run)
    return True


def _commit_rollback(run: Run) -> None:
    """Makes a rollback final before training goes on: a crash from here on neither undoes nor repeats it."""
    url = _save(run, {})
    run.checkpointer.drain()
    if run.runtime.is_main:
        run.checkpointer.mark_healthy(url)
        run.checkpointer.end_rollback()
    run.runtime.control_group.barrier()
    _report_written(run)


def _report_damage(run: Run) -> None:
    """Tells of images that some rank had to replace; each once.

    Raises:
        TrainingFailed: on every rank, if there are more than may be.
    """
    stream, tracker = run.state.stream, run.tracker
    found = run.runtime.control_group.gather_json(stream.damaged())
    new = stream.note_damaged(Damage(*item) for rank in found for item in rank)
    for damage in new[:DAMAGE_SHOWN]:
        tracker.say(f"a damaged image was replaced: {damage.key!r} of {damage.url}: {damage.reason}")
    for damage in new:
        tracker.event("bad_sample", images=run.state.progress.images, **damage._asdict())


def _compare_replicas(run: Run) -> None:
    """Ends the run when the ranks no longer train the same networks; a checkpoint compares everything it keeps."""
    state, fingerprints = run.state, Fingerprints(enabled=run.runtime.world_size > 1)
    for player in (state.generator, state.discriminator):
        for part in player.weights():
            for name, tensor in part.items():
                fingerprints.add(f"{player.name}/weights/{name}", tensor)
        for name, tensor in player.module.named_buffers():
            fingerprints.add(f"{player.name}/buffers/{name}", tensor)
    for name, tensor in state.ema.tensors():
        fingerprints.add(f"ema/{name}", tensor)
    run.runtime.control_group.compare_replicas(fingerprints)


def _grid(run: Run) -> None:
    if run.runtime.is_main:
        config = run.config
        pictures = fixed_grid(
            run.state.ema.module, run.draws, count=config.log.samples, classes=config.networks.classes
        )
        run.tracker.grid("generated", run.state.progress.images, pictures)


def _asked_to_stop(run: Run, before: int) -> str | None:
    """The signal that some rank has got, looked for at an interval that is the same on all ranks.

    Raises:
        TrainingFailed: on every rank, if a checkpoint that is being written has failed on any.
    """
    config, runtime = run.config, run.runtime
    if not _due(before, run.state.progress.images, config.runtime.stop_every, config.run.images):
        return None
    if not runtime.control_group.any_rank(run.stop.requested or run.checkpointer.failed):
        return None
    run.checkpointer.drain()
    return next((name for name in runtime.control_group.gather_json(run.stop.signal) if name is not None), None)


def _save(run: Run, shown: Scalars) -> str:
    """Begins a checkpoint; the one before it is healthy if no update has been skipped since."""
    state, checkpointer = run.state, run.checkpointer
    checkpointer.drain()
    _report_written(run)
    if state.recovery.quiet and run.healthy_next and run.runtime.is_main:
        checkpointer.mark_healthy(run.healthy_next[-1])
    url = checkpointer.save(state.progress.images, state.parts(), scalars=shown)
    run.healthy_next[:] = [url] if state.recovery.quiet else []
    run.tracker.flush()
    return url


def _report_written(run: Run) -> None:
    """Events of the checkpoints that have been committed since the last look."""
    for done in run.checkpointer.finished():
        run.tracker.event(
            "checkpoint",
            images=done.images,
            url=done.url,
            blocked_s=round(done.blocked_s, 4),
            durable_s=round(done.durable_s, 4),
        )


def _leave(run: Run, asked: str) -> End:
    """Ends a run that was asked to stop, once its checkpoint is committed."""
    run.checkpointer.drain()
    _report_written(run)
    images, commit = run.state.progress.images, run.checkpointer.newest().url
    run.tracker.say(f"asked to stop ({asked}); saved {commit}: start the same command again to go on")
    run.tracker.event("preempted", images=images, signal=asked, checkpoint=commit)
    return End(images, asked, commit)


def _finish(run: Run) -> End:
    """The last checkpoint, the last event, and what to look at and type next."""
    run.checkpointer.drain()
    _report_written(run)
    config, tracker, progress = run.config, run.tracker, run.state.progress
    facts: dict[str, float | int] = {}
    if config.data.num_drawn:
        facts = count_modes(
            run.state.ema.module, run.draws, run.runtime, samples=MODE_SAMPLES, classes=config.networks.classes
        )
        tracker.scalars(
            progress.images, {f"metric/{name}": float(value) for name, value in facts.items()}, clock={}
        )  # fmt: skip
    tracker.event("end", images=progress.images, seconds=round(progress.seconds, 1), **facts)
    folder = Path(config.run.dir)
    if facts:
        tracker.say(
            f"modes: {facts['modes_covered']} of {facts['modes_total']} covered, the rarest at "
            f"{100 * facts['smallest_share']:.0f}% of its fair share; {100 * facts['valid_fraction']:.1f}% of "
            f"{MODE_SAMPLES:,} samples are valid"
        )
    newest = run.checkpointer.newest().url
    tracker.say(
        f"finished: {progress.images:,} images in {progress.seconds:.0f} s",
        f"  samples      {folder / 'samples' / f'generated-{progress.images:012d}.png'}",
        f"  TensorBoard  tensorboard --logdir {folder / 'tensorboard'}",
        f"  checkpoint   {newest}",
        f"  next         dist-gan sample {folder} samples.png",
        f"               dist-gan export {folder} generator",
    )
    return End(progress.images, None, newest)
