"""The training loop, and its decisions to log, save, roll back or end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dist_gan.build import Run
from dist_gan.data import Damage
from dist_gan.evaluate import fixed_grid, to_pictures
from dist_gan.health.monitor import Verdict, judge
from dist_gan.health.recovery import Action
from dist_gan.metrics import Metric, measure
from dist_gan.runtime import Fingerprints
from dist_gan.schedules import knobs_at
from dist_gan.tracker import profiled
from dist_gan.types import Scalars, TrainingFailed, UserError


class End(NamedTuple):
    """Result of a run that did not fail."""

    images: int
    stopped_by: str | None
    """Name of the signal that asked the run to stop; None if the run finished."""
    commit: str | None
    """URL of the run's last checkpoint."""


class Passed(NamedTuple):
    """Numbers of images seen before and after a step."""

    before: int
    now: int
    total: int

    def due(self, every: int) -> bool:
        """True if a multiple of the interval, in images, was reached in this step, or if the run has ended."""
        return self.before // every != self.now // every or self.now >= self.total


def fit(run: Run) -> End:
    """Trains until `run.images` have been seen or any rank is asked to stop. Collective.

    Raises:
        TrainingFailed: a failure that no rollback repairs, different replicas, unreadable data, or unwritable files.
    """
    config, game, saving, report, state = run.config, run.game, run.saving, run.report, run.state
    progress, recovery, total = state.progress, state.recovery, config.run.images
    shown: Scalars = {}
    metrics: Scalars = {}
    health: Scalars = {}
    is_first = True
    if progress.images == 0:
        report.tracker.grid("real", 0, to_pictures(state.stream.preview(config.log.samples)))
    report.begin()
    enabled = config.run.profile and game.runtime.is_main
    with profiled(report.tracker.folder / "tensorboard", enabled=enabled) as step_done:
        while progress.images < total:
            before = progress.images
            knobs = recovery.soften(knobs_at(before, config=config))
            updates = game.step(knobs, report.scalars)
            passed = Passed(before, progress.images, total)
            verdict = recovery.watch(updates)
            report.skipped(updates)
            if verdict is None:
                if is_first:
                    game.runtime.shorten_timeout()
                is_first = False
                step_done()
                if config.runtime.compare_every and passed.due(config.runtime.compare_every):
                    _compare_replicas(run)
                ticked = passed.due(config.log.every) or passed.due(config.checkpoint.every)
                if ticked:
                    _note_damage(run)
                    shown = report.tick(knobs)
                metrics = _measure(run, run.metrics, passed, kind="metric")
                health = _measure(run, run.measures, passed, kind="health")
                if ticked or metrics or health:
                    verdict = judge(run.detectors, passed.now, (shown if ticked else {}) | metrics | health)
            if verdict is not None:
                _act(run, verdict, recovery.decide(verdict))
                shown = {}
                continue
            if passed.due(config.log.samples_every):
                _grid(run)
            asked = _asked_to_stop(run, passed)
            if asked or passed.due(config.checkpoint.every):
                saving.save(shown | metrics | health)
            if asked and passed.now < total:
                commit = saving.newest()
                report.preempted(signal=asked, checkpoint=commit)
                return End(passed.now, asked, commit)
            saving.note_committed()
    if is_first:  # the run had already reached its last image when it was resumed
        metrics = _measure(run, run.metrics, Passed(total, progress.images, total), kind="metric")
    commit = saving.newest()
    report.finished(metrics=metrics, checkpoint=commit)
    return End(progress.images, None, commit)


def _act(run: Run, verdict: Verdict, action: Action) -> None:
    """Rolls the run back, or ends it.

    Raises:
        TrainingFailed: the budget of rollbacks is spent, or there is no healthy checkpoint.
    """
    failed_at = run.state.progress.images
    reason = f"training failed at {failed_at:,} images: {action.reason}"
    run.report.failure(verdict, action.reason)
    if action.kind == "stop":
        raise TrainingFailed(reason)
    target = run.saving.roll_back(reason=reason)
    run.report.rolled_back(target, failed_at=failed_at, reason=action.reason)
    run.saving.commit_rollback()


def _measure(run: Run, metrics: Sequence[Metric], passed: Passed, *, kind: str) -> Scalars:
    """Measures the metrics that are due; logs their values as `kind/name` and returns them. Collective.

    Raises:
        UserError: two metrics return a value of the same name, or a metric returns no numbers.
    """
    found: Scalars = {}
    for metric in metrics:
        if passed.due(metric.every):
            shown = run.report.measured(kind, metric, measure(metric, run.samples()))
            if twice := sorted(found.keys() & shown.keys()):
                raise UserError(f"the metric {metric.name!r} returns {twice[0]}, as another metric does; rename one")
            found |= shown
    return found


def _note_damage(run: Run) -> None:
    """Counts and reports, once each, the damaged images that any rank had to replace. Collective.

    Raises:
        TrainingFailed: more images are damaged than `data.max_bad` allows; raised on every rank.
    """
    stream = run.state.stream
    found = run.game.runtime.control_group.gather_json(stream.damaged())
    run.report.damage(stream.note_damaged(Damage(*item) for rank in found for item in rank))


def _compare_replicas(run: Run) -> None:
    """Raises TrainingFailed if the ranks' replicas differ. Each checkpoint compares all tensors; this check compares
    some.
    """
    state, runtime = run.state, run.game.runtime
    fingerprints = Fingerprints(enabled=runtime.world_size > 1)
    for player in (state.generator, state.discriminator):
        for part in player.weights():
            for name, tensor in part.items():
                fingerprints.add(f"{player.name}/weights/{name}", tensor)
        for name, tensor in player.module.named_buffers():
            fingerprints.add(f"{player.name}/buffers/{name}", tensor)
    for name, tensor in state.ema.tensors():
        fingerprints.add(f"ema/{name}", tensor)
    runtime.control_group.compare_replicas(fingerprints)


def _grid(run: Run) -> None:
    """Writes a grid of samples from fixed latents. Rank 0 alone."""
    if run.game.runtime.is_main:
        count, classes = run.config.log.samples, run.config.networks.classes
        pictures = fixed_grid(run.state.ema.module, run.game.draws, count=count, classes=classes)
        run.report.tracker.grid("generated", run.state.progress.images, pictures)


def _asked_to_stop(run: Run, passed: Passed) -> str | None:
    """Returns the name of the stop signal that any rank has received, checked at the same steps on all ranks.
    Collective.

    Raises:
        TrainingFailed: a checkpoint that is being written has failed on some rank; raised on every rank.
    """
    runtime = run.game.runtime
    if not passed.due(run.config.runtime.stop_every):
        return None
    if not runtime.control_group.any_rank(run.stop.requested or run.saving.checkpointer.failed):
        return None
    run.saving.wait()
    return next((name for name in runtime.control_group.gather_json(run.stop.signal) if name is not None), None)
