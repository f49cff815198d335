"""Report of a training run: wording of its messages and events, timing and counters. Rank 0 alone writes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dist_gan.checkpoint.share import CommittedCheckpoint
from dist_gan.data import Damage, Stream
from dist_gan.health.monitor import Verdict
from dist_gan.metrics import Metric
from dist_gan.resume import Resumed
from dist_gan.runtime import Runtime, Update
from dist_gan.scalars import ScalarMeans
from dist_gan.state import Progress, TrainState
from dist_gan.tracker import Tracker
from dist_gan.types import Knobs, Scalars

DAMAGE_SHOWN = 10
"""Largest number of damaged images that are listed on the terminal at a time; events.jsonl lists all of them."""


class Clock:
    """Timing of the training loop, on this rank."""

    def __init__(self, progress: Progress, stream: Stream) -> None:
        self._progress, self._stream = progress, stream
        self._images, self._since, self._waited = progress.images, time.perf_counter(), stream.waited_s

    def tick(self, runtime: Runtime) -> Scalars:
        """Returns the timing since the last tick, and adds the elapsed seconds to the run's counter."""
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


class Report:
    """Messages, events and scalars of a run while it trains.

    Args:
        tracker: log files, TensorBoard and the terminal.
        runtime: this process and its process groups.
        state: state of the run, whose counters the report shows.
    """

    def __init__(self, tracker: Tracker, runtime: Runtime, state: TrainState) -> None:
        self.tracker = tracker
        self.scalars = ScalarMeans()
        """Losses and gradient norms, averaged since the last tick."""
        self._runtime, self._state = runtime, state
        self._clock = Clock(state.progress, state.stream)

    @property
    def _images(self) -> int:
        return self._state.progress.images

    # -- scalars --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Starts the timing, when training starts."""
        self._clock = Clock(self._state.progress, self._state.stream)

    def tick(self, knobs: Knobs) -> Scalars:
        """Logs means since the last tick, counters, settings and timing; returns all of them except the timing.
        Collective.

        Args:
            knobs: settings that the last step was made with.
        """
        shown = self.scalars.flush(self._runtime) | _counters(self._state) | _prefixed("knobs", knobs._asdict())
        timing = self._clock.tick(self._runtime)
        self.tracker.scalars(self._images, shown, clock=timing)
        self.tracker.progress(self._images, shown, clock=timing)
        return shown

    def measured(self, kind: str, metric: Metric, values: Scalars) -> Scalars:
        """Logs the values of a metric as `kind/name`, and returns them by these names; prints those of the kind
        `metric`.
        """
        shown = _prefixed(kind, values)
        self.tracker.scalars(self._images, shown, clock={})
        if kind == "metric":
            self.tracker.say(metric.describe(values))
        return shown

    # -- messages and events --------------------------------------------------------------------------------------

    def started(self, resumed: Resumed, *, attempt: int, config_hash: str) -> None:
        """Reports the start of the run: the checkpoint that it resumes from, and notes for the user."""
        tracker, runtime = self.tracker, self._runtime
        for text in resumed.notes:
            tracker.say(text)
        start = f"resumed from {resumed.url} at {self._images:,} images" if resumed.url else "from scratch"
        tracker.say(f"attempt {attempt}: {start}; {runtime.summary}")
        tracker.event(
            "resume" if resumed.url else "start",
            images=self._images,
            checkpoint=resumed.url,
            notes=resumed.notes,
            config_hash=config_hash,
            **runtime.describe(),
        )

    def skipped(self, updates: Sequence[Update]) -> None:
        """Reports skipped updates; of each player only the 1st, 2nd, 4th, 8th and so on."""
        for update in updates:
            count = self._state.recovery.skipped[update.player]
            if not update.applied and count & (count - 1) == 0:
                self.tracker.say(
                    f"skipped an update of the {update.player}: the gradient of {update.culprit} is not finite"
                )
                self.tracker.event(
                    "skipped_update",
                    images=self._images,
                    player=update.player,
                    tensor=update.culprit,
                    skipped=count,
                )

    def damage(self, new: Sequence[Damage]) -> None:
        """Damaged images that were replaced by others."""
        for damage in new[:DAMAGE_SHOWN]:
            self.tracker.say(f"a damaged image was replaced: {damage.key!r} of {damage.url}: {damage.reason}")
        for damage in new:
            self.tracker.event("bad_sample", images=self._images, **damage._asdict())

    def failure(self, verdict: Verdict, reason: str) -> None:
        """Reports a failure of the training, before the run rolls back or ends."""
        self.tracker.event("failure", images=self._images, phenomenon=verdict.phenomenon, reason=reason)

    def rolled_back(self, target: str, *, failed_at: int, reason: str) -> None:
        """Reports a rollback to a checkpoint; sets aside what was logged after that checkpoint, and restarts means and
        timing.
        """
        tracker = self.tracker
        tracker.rewind(self._images)
        tracker.say(f"{reason}; back from {failed_at:,} to {self._images:,} images, the healthy {target}")
        tracker.event(
            "rollback",
            images=self._images,
            failed_at=failed_at,
            checkpoint=target,
            rollbacks=self._state.recovery.rollbacks,
        )
        self.scalars = ScalarMeans()
        self.begin()

    def committed(self, checkpoints: Sequence[CommittedCheckpoint]) -> None:
        """Reports checkpoints that have been committed."""
        for done in checkpoints:
            self.tracker.event(
                "checkpoint",
                images=done.images,
                url=done.url,
                blocked_s=round(done.blocked_s, 4),
                durable_s=round(done.durable_s, 4),
            )

    def preempted(self, *, signal: str, checkpoint: str | None) -> None:
        """Reports the end of a run that was asked to stop."""
        self.tracker.say(f"asked to stop ({signal}); saved {checkpoint}: start the same command again to go on")
        self.tracker.event("preempted", images=self._images, signal=signal, checkpoint=checkpoint)

    def finished(self, *, metrics: Scalars, checkpoint: str | None) -> None:
        """Reports the end of a run that has seen all its images: the sample grid, and the commands to type next."""
        tracker, progress, folder = self.tracker, self._state.progress, self.tracker.folder
        facts = {"metrics": metrics} if metrics else {}
        tracker.event("end", images=progress.images, seconds=round(progress.seconds, 1), **facts)
        tracker.say(
            f"finished: {progress.images:,} images in {progress.seconds:.0f} s",
            f"  samples      {folder / 'samples' / f'generated-{progress.images:012d}.png'}",
            f"  TensorBoard  tensorboard --logdir {folder / 'tensorboard'}",
            f"  checkpoint   {checkpoint}",
            f"  next         dist-gan sample {folder} samples.png",
            f"               dist-gan export {folder} generator",
        )


def _counters(state: TrainState) -> Scalars:
    recovery = state.recovery
    skipped = {f"skipped/{name}": float(count) for name, count in recovery.skipped.items()}
    data = {"data/damaged": float(state.stream.num_damaged)}
    return skipped | {"recovery/rollbacks": float(recovery.rollbacks)} | data


def _prefixed(kind: str, values: Scalars) -> Scalars:
    return {f"{kind}/{name}": value for name, value in values.items()}
