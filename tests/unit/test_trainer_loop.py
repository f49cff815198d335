"""Whole runs on points in this process: what is written when, and what a skip, a rollback, a crash and a stop leave."""

from __future__ import annotations

import math
import os
import signal
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_gan import pictures
from dist_gan.build import Run
from dist_gan.checkpoint import reader
from dist_gan.draws import Draws
from dist_gan.evaluate import density
from dist_gan.models import build_generator
from dist_gan.runtime import StopRequest
from dist_gan.trainer import fit
from dist_gan.types import Batch, TrainingFailed
from tests.games import lines, points_config, poison, started, trained

EVERY_TEN_STEPS = (
    "run.images=480", "checkpoint.every=80", "checkpoint.keep=100", "log.every=40", "log.samples=4",
    "objective.kind=nonsaturating", "g_optim.lr=1e-3", "d_optim.lr=1e-3",
)  # fmt: skip
"""60 steps of 8 images; checkpoints 1 to 6 after each tenth step, a line of the log after each fifth."""


def checkpoints(folder: Path, mark: str = "COMMIT") -> list[tuple[int, int]]:
    """Serial and images of the checkpoints that bear a mark."""
    names = sorted(place.parent.name for place in (folder / "checkpoints").glob(f"*/{mark}"))
    return [(int(name.split("-")[1]), int(name.split("-")[2])) for name in names]


def content(folder: Path, serial: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    (place,) = (folder / "checkpoints").glob(f"checkpoint-{serial:04d}-*")
    return reader.read(str(place))


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in lines(folder / "events.jsonl") if event["event"] in kinds]


def first_reaching(every: int, *, batch: int, total: int) -> list[int]:
    """Images after the first step at or beyond each multiple of an interval, and after the last step."""
    last = batch * math.ceil(total / batch)
    return sorted({batch * math.ceil(k / batch) for k in range(every, last + 1, every)} | {last})


# -- a run that nothing happens to ----------------------------------------------------------------------------------


def test_a_run_logs_saves_and_draws_at_its_intervals_and_at_its_end(tmp_path: Path) -> None:
    end = trained(
        tmp_path, "run.batch=24", "run.images=1000", "log={every: 100, samples_every: 300, samples: 4}",
        "checkpoint={every: 300, keep: 100}", "g_optim.lr={start: 1e-3, end: 0, images: 1000}", "ema.half_life=200",
    )  # fmt: skip
    assert (end.images, end.stopped_by) == (1008, None)
    saves = first_reaching(300, batch=24, total=1000)
    assert saves == [312, 600, 912, 1008]
    assert checkpoints(tmp_path) == list(enumerate(saves, start=1))
    assert checkpoints(tmp_path, "HEALTHY") == list(enumerate(saves, start=1))[:-1]
    assert [event["images"] for event in events(tmp_path, "checkpoint")] == saves
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [tick["images"] for tick in metrics] == sorted({*first_reaching(100, batch=24, total=1000), *saves})
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == [*(f"generated-{n:012d}.png" for n in saves), "real-000000000000.png"]
    assert [event["event"] for event in lines(tmp_path / "events.jsonl")] == ["start", *["checkpoint"] * 4, "end"]

    # Settings are those that the last step was made with; the speed is that of the images since the line before.
    for tick in metrics:
        assert tick["knobs/g_lr"] == pytest.approx(1e-3 * (1 - (tick["images"] - 24) / 1000))
    for before, now in pairwise(metrics):
        seconds = now["time/seconds"] - before["time/seconds"]
        assert now["time/images_per_second"] * seconds == pytest.approx(now["images"] - before["images"])
    assert metrics[0]["time/images_per_second"] * metrics[0]["time/seconds"] == pytest.approx(metrics[0]["images"])
    assert content(tmp_path, 4)[0]["values"]["progress"]["seconds"] == metrics[-1]["time/seconds"]
    scalars = content(tmp_path, 4)[0]["scalars"]
    assert scalars["loss/generator"] == metrics[-1]["loss/generator"]

    # Every grid: the averaged generator's points at the same latents.
    latents = Draws(0, dtype=torch.float64).normal("latents/samples", draw=0, slots=torch.arange(4), shape=(4,))
    for serial, count in enumerate(saves, start=1):
        tensors = content(tmp_path, serial)[1]
        generator = build_generator(points_config().networks).double()
        generator.load_state_dict({n.removeprefix("ema/"): t for n, t in tensors.items() if n.startswith("ema/")})
        with torch.no_grad():
            expected = pictures.grid(density(generator(latents).float().numpy())[None], columns=1)
        shown = np.asarray(Image.open(tmp_path / "samples" / f"generated-{count:012d}.png"))
        assert np.array_equal(shown, expected), count


def test_the_share_of_time_spent_waiting_for_data_is_what_the_stream_says(tmp_path: Path) -> None:
    with started(tmp_path, "run.images=400", "log.every=80", "log.samples=1") as run:
        stream, honest = run.state.stream, run.state.stream.next

        def slow() -> Batch:
            stream.waited_s += 0.25
            return honest()

        stream.next = slow  # type: ignore[method-assign]
        fit(run)
        a_step = 2 if run.game.rules.fresh_batch_for_g else 1
    for before, now in pairwise(lines(tmp_path / "metrics.jsonl")):
        seconds = now["time/seconds"] - before["time/seconds"]
        assert now["time/data_wait_share"] * seconds == pytest.approx(10 * a_step * 0.25)


# -- resuming -------------------------------------------------------------------------------------------------------

REMEMBERING = (
    "run.d_updates=2", "objective={kind: hinge, lecam: 0.1, r1_gamma: 0.3, penalty_every: 3}", "g_optim.beta1=0.5",
    "d_optim={kind: sgd, lr: 1e-2, momentum: 0.9}", "ema={half_life: 100, warmup: 0.1}",
)  # fmt: skip


def test_a_run_that_crashed_ends_where_an_unbroken_one_does_and_each_point_is_logged_once(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trained(whole, *EVERY_TEN_STEPS, *REMEMBERING)
    with started(broken, *EVERY_TEN_STEPS, *REMEMBERING) as run:
        stream, honest = run.state.stream, run.state.stream.next

        def crash() -> Batch:
            if stream.values()["draw"] == 45:  # two draws a step: after 22 steps, 352 images, 32 after a checkpoint
                raise ZeroDivisionError
            return honest()

        stream.next = crash  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            fit(run)
        run.saving.checkpointer.drain()
    written = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    seconds = content(broken, 4)[0]["values"]["progress"]["seconds"]
    end = trained(broken, *EVERY_TEN_STEPS, *REMEMBERING, attempt=2)
    assert (end.images, checkpoints(broken)) == (480, checkpoints(whole))
    (manifest, tensors), (manifest_b, tensors_b) = content(whole, 6), content(broken, 6)
    assert tensors.keys() == tensors_b.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], tensors_b[name])] == []
    for found in (manifest, manifest_b):
        found["values"]["progress"].pop("seconds")
    assert manifest["values"] == manifest_b["values"]
    assert manifest["values"]["stream"]["draw"] == 60
    (resumed,) = events(broken, "resume")
    assert resumed["images"] == 320
    assert resumed["checkpoint"].endswith("checkpoint-0004-000000000320")

    metrics, expected = lines(broken / "metrics.jsonl"), lines(whole / "metrics.jsonl")
    assert [(m["images"], m["loss/generator"]) for m in metrics] == [
        (m["images"], m["loss/generator"]) for m in expected
    ]
    assert [m["attempt"] for m in metrics] == [1] * 8 + [2] * 4
    assert metrics[8]["time/seconds"] > seconds, "time goes on from the checkpoint"
    assert (broken / "metrics.jsonl").read_text().startswith("".join(written[:8]))
    aside = (broken / "metrics.before-attempt-0002.jsonl") if len(written) > 8 else None
    assert aside is None or aside.read_text() == "".join(written[8:])


# -- skipped updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_checkpoint_is_healthy_if_no_update_of_the_window_was_skipped_before_it_nor_until_the_next(
    player: str, tmp_path: Path
) -> None:
    with started(tmp_path, *EVERY_TEN_STEPS, "recovery={window: 10, max_nonfinite: 100}") as run:
        parameter = next(iter(getattr(run.state, player).parameters.values()))
        fired = poison(parameter, backward_passes=[24])
        fit(run)
    assert fired == [24]
    assert [serial for serial, _ in checkpoints(tmp_path)] == [1, 2, 3, 4, 5, 6]
    # The 25th update lies between checkpoints 2 and 3, in the window until the 34th; nothing comes after 6.
    assert [serial for serial, _ in checkpoints(tmp_path, "HEALTHY")] == [1, 4, 5]
    (skip,) = events(tmp_path, "skipped_update")
    assert (skip["images"], skip["player"], skip["skipped"]) == (200, player, 1)
    assert skip["tensor"].startswith(f"{player}/")
    counts = [tick[f"skipped/{player}"] for tick in lines(tmp_path / "metrics.jsonl")]
    assert counts == [0.0] * 4 + [1.0] * 8
    other = ({"generator", "discriminator"} - {player}).pop()
    assert {tick[f"skipped/{other}"] for tick in lines(tmp_path / "metrics.jsonl")} == {0.0}


# -- rollbacks ------------------------------------------------------------------------------------------------------

FOUR_OF_TEN = "recovery={window: 10, max_nonfinite: 4, rollbacks: 1}"


def test_a_rollback_goes_to_the_newest_healthy_checkpoint_and_draws_on(tmp_path: Path) -> None:
    with started(tmp_path, *EVERY_TEN_STEPS, FOUR_OF_TEN) as run:
        fired = poison(run.state.generator.parameters["out.weight"], backward_passes=[24, 25, 26, 27])
        fit(run)
    assert fired == [24, 25, 26, 27]
    # At the 28th step checkpoint 2 is the newest, and nobody knows yet whether it is healthy; 1 is.
    # Retention takes 2 away, which was abandoned, once 3 is committed.
    assert checkpoints(tmp_path) == [(1, 80), (3, 80), (4, 160), (5, 240), (6, 320), (7, 400), (8, 480)]
    assert checkpoints(tmp_path, "ABANDONED") == []
    assert [serial for serial, _ in checkpoints(tmp_path, "HEALTHY")] == [1, 3, 4, 5, 6, 7]
    (before, weights), (after, weights_after) = content(tmp_path, 1), content(tmp_path, 3)
    assert [name for name in weights if not torch.equal(weights[name], weights_after[name])] == []
    assert before["values"]["stream"]["draw"] == 10
    assert after["values"]["stream"]["draw"] == 28, "the batches that failed are not drawn again"
    assert content(tmp_path, 8)[0]["values"]["stream"]["draw"] == 28 + 50
    counters = ("images", "d_updates", "g_updates", "averaged_images")
    for name in counters:
        assert after["values"]["progress"][name] == before["values"]["progress"][name]
    assert after["values"]["progress"]["seconds"] > before["values"]["progress"]["seconds"], (
        "time that was spent is spent"
    )
    assert after["values"]["recovery"]["rollbacks"] == 1
    assert after["values"]["recovery"]["skipped"] == {"discriminator": 0, "generator": 4}
    assert not (tmp_path / "checkpoints" / "rollback.json").exists()

    (failure,), (rollback,) = events(tmp_path, "failure"), events(tmp_path, "rollback")
    assert failure["images"] == rollback["failed_at"] == 28 * 8
    assert (rollback["images"], rollback["rollbacks"]) == (80, 1)
    assert rollback["checkpoint"].endswith("checkpoint-0001-000000000080")
    assert [event["skipped"] for event in events(tmp_path, "skipped_update")] == [1, 2, 4]
    metrics, aside = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "metrics.before-rollback-0001-01.jsonl")
    assert [tick["images"] for tick in metrics] == list(range(40, 481, 40))
    assert [tick["images"] for tick in aside] == [120, 160, 200]
    assert [tick["recovery/rollbacks"] for tick in metrics] == [0.0] * 2 + [1.0] * 10
    times = [tick["time/seconds"] for tick in (*metrics[:2], *aside, *metrics[2:])]
    assert times == sorted(times)


def test_a_checkpoint_in_flight_when_the_run_rolls_back_is_waited_for_and_abandoned(tmp_path: Path) -> None:
    with started(tmp_path, *EVERY_TEN_STEPS, FOUR_OF_TEN) as run:
        checkpointer, may_write = run.saving.checkpointer, threading.Event()
        honest_write, honest_drain, honest_mark = checkpointer._write, checkpointer.drain, checkpointer.abandon_after

        def write(job: Any, buffer: Any) -> None:
            if job.url.endswith("checkpoint-0002-000000000160"):
                assert may_write.wait(60)
            honest_write(job, buffer)

        def drain() -> None:
            may_write.set()
            honest_drain()

        def abandon_after(target: str) -> None:
            honest_mark(target)
            may_write.set()  # a rollback that has not waited goes on beside the write

        checkpointer._write = write  # type: ignore[method-assign]
        checkpointer.drain = drain  # type: ignore[method-assign]
        checkpointer.abandon_after = abandon_after  # type: ignore[method-assign]
        poison(run.state.generator.parameters["out.weight"], backward_passes=[24, 25, 26, 27])
        fit(run)
    assert checkpoints(tmp_path) == [(1, 80), (3, 80), (4, 160), (5, 240), (6, 320), (7, 400), (8, 480)]


def test_gradients_that_stay_not_finite_end_the_run_once_the_budget_is_spent(tmp_path: Path) -> None:
    with started(tmp_path, *EVERY_TEN_STEPS, FOUR_OF_TEN) as run:
        poison(run.state.discriminator.parameters["head.linear.weight"], backward_passes=range(24, 1000))
        with pytest.raises(TrainingFailed, match="gone back 1 times") as failed:
            fit(run)
        assert run.state.progress.images == 80 + 4 * 8, "a new window began with the rollback"
    assert "discriminator/head.linear.weight" in str(failed.value)
    assert len(events(tmp_path, "rollback")) == 1
    assert len(events(tmp_path, "failure")) == 2


def test_without_a_healthy_checkpoint_the_run_ends(tmp_path: Path) -> None:
    with started(tmp_path, *EVERY_TEN_STEPS, FOUR_OF_TEN) as run:
        poison(run.state.generator.parameters["out.weight"], backward_passes=range(14, 1000))
        with pytest.raises(TrainingFailed, match="no healthy checkpoint"):
            fit(run)
    assert checkpoints(tmp_path, "ABANDONED") == []


@pytest.mark.parametrize("committed", [False, True], ids=["cut-off-before-its-commit", "cut-off-after-its-commit"])
def test_a_rollback_that_was_cut_off_is_finished_by_the_next_start_and_not_done_twice(
    committed: bool, tmp_path: Path
) -> None:
    class CutOff(BaseException):
        """Stands for the end of the process."""

    def cut_off(*_: Any, **__: Any) -> None:
        raise CutOff

    with started(tmp_path, *EVERY_TEN_STEPS, FOUR_OF_TEN) as run:
        poison(run.state.generator.parameters["out.weight"], backward_passes=[24, 25, 26, 27])
        if committed:
            run.saving.checkpointer.end_rollback = cut_off  # type: ignore[method-assign]
        else:
            run.saving.checkpointer.load = cut_off  # type: ignore[method-assign]
        with pytest.raises(CutOff):
            fit(run)
        run.saving.checkpointer.drain()
    assert (tmp_path / "checkpoints" / "rollback.json").exists()
    assert checkpoints(tmp_path) == [(1, 80), (3, 80) if committed else (2, 160)]
    assert checkpoints(tmp_path, "ABANDONED") == ([] if committed else [(2, 160)])
    first = 4 if committed else 3  # serial of the checkpoint that the next start commits
    with started(tmp_path, *EVERY_TEN_STEPS, FOUR_OF_TEN, attempt=2) as run:
        assert run.state.progress.images == 80
        assert run.state.stream.values()["draw"] == 28
        assert run.state.recovery.values()["rollbacks"] == 1
        assert run.state.recovery.skipped == {"discriminator": 0, "generator": 4}
        assert not (tmp_path / "checkpoints" / "rollback.json").exists()
        assert (first, 80) in checkpoints(tmp_path, "HEALTHY"), "there is something to go back to at once"
        fit(run)
    (resumed,) = events(tmp_path, "resume")
    assert resumed["checkpoint"].endswith(f"checkpoint-{first - 1 if committed else 1:04d}-000000000080")
    assert checkpoints(tmp_path)[: first - 2] == [(1, 80), (3, 80)][: first - 2]
    assert checkpoints(tmp_path)[first - 2 :] == [(first + n, 80 * (1 + n)) for n in range(6)]
    target, finished = content(tmp_path, 1)[1], content(tmp_path, first)[1]
    assert [name for name in target if not torch.equal(target[name], finished[name])] == []
    assert content(tmp_path, first + 5)[0]["values"]["stream"]["draw"] == 28 + 50
    assert [tick["images"] for tick in lines(tmp_path / "metrics.jsonl")] == list(range(40, 481, 40))


# -- a request to stop ----------------------------------------------------------------------------------------------


def stopped_at(run: Run, step: int) -> Run:
    """The run, with a signal that comes while it takes its n-th batch."""
    stream, honest = run.state.stream, run.state.stream.next

    def asking() -> Batch:
        batch = honest()
        if batch.draw == step - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    stream.next = asking  # type: ignore[method-assign]
    return run


def test_a_request_to_stop_is_seen_at_its_interval_and_saved_before_the_run_leaves(tmp_path: Path) -> None:
    stop = StopRequest(names=("USR1",))
    stop.training_begins()
    try:
        with started(tmp_path, *EVERY_TEN_STEPS, "runtime.stop_every=56") as run:
            end = fit(stopped_at(run._replace(stop=stop), 9))
    finally:
        stop.close()
    # The 9th step ends at 72 images; the next multiple of 56 is 112.
    assert (end.images, end.stopped_by) == (112, "SIGUSR1")
    assert str(end.commit).endswith("checkpoint-0002-000000000112")
    assert checkpoints(tmp_path) == [(1, 80), (2, 112)]
    (asked,) = events(tmp_path, "preempted")
    assert (asked["images"], asked["signal"], asked["checkpoint"]) == (112, "SIGUSR1", end.commit)
    assert events(tmp_path, "end") == []
    trained(tmp_path, *EVERY_TEN_STEPS, attempt=2)
    trained(tmp_path / "whole", *EVERY_TEN_STEPS)
    expected = content(tmp_path / "whole", 6)[1]
    resumed = content(tmp_path, len(checkpoints(tmp_path)))[1]
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_a_request_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    stop = StopRequest(names=("USR1",))
    stop.training_begins()
    try:
        with started(tmp_path, *EVERY_TEN_STEPS) as run:
            end = fit(stopped_at(run._replace(stop=stop), 60))
    finally:
        stop.close()
    assert (end.images, end.stopped_by) == (480, None)
    assert len(events(tmp_path, "end")) == 1
