"""Metrics, measures and detectors handed to a run: when they are called, what they see, and where their values go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_gan.build import _metrics_of_data
from dist_gan.checkpoint import reader
from dist_gan.config.reader import load_config
from dist_gan.draws import Draws
from dist_gan.embedded.shapes import draw_shapes
from dist_gan.evaluate import sample
from dist_gan.health.monitor import Verdict
from dist_gan.metrics import Metric, Samples, measure
from dist_gan.metrics.modes import mode_count
from dist_gan.models import build_generator
from dist_gan.own_parts import OwnParts
from dist_gan.trainer import fit
from dist_gan.types import Batch, Knobs, Scalars, TrainingFailed, UserError
from tests.games import lines, points_config, started, trained

GAME = (
    "run.images=480", "checkpoint={every: 160, keep: 100}", "log.every=80", "log.samples=1", "ema.half_life=50",
    "g_optim.lr=1e-2", "d_optim.lr=1e-2",
)  # fmt: skip
"""60 steps of 8 images; a checkpoint after each twentieth step, a line of the log after each tenth."""


def spread(samples: Samples) -> dict[str, float]:
    """Root mean square of the samples' coordinates, and a number that torch's own generator draws."""
    square = sum((part.double().square().sum() for part in samples.generated(7)), torch.zeros(()))
    return {"spread": float(samples.sum(square) / 7) ** 0.5, "noise": float(torch.rand(()))}


SPREAD = Metric("spread", 120, spread)


def spread_of(tensors: dict[str, torch.Tensor]) -> float:
    """The spread of a checkpoint's averaged generator, with samples made here."""
    generator = build_generator(points_config().networks).double()
    generator.load_state_dict({n.removeprefix("ema/"): t for n, t in tensors.items() if n.startswith("ema/")})
    parts = sample(generator, Draws(0, dtype=torch.float64), slots=torch.arange(7), purpose="metrics")
    return float(torch.cat(list(parts)).square().sum() / 7) ** 0.5


def measured(folder: Path, prefix: str) -> list[dict[str, Any]]:
    """Lines of the log that hold values with a prefix, without their attempt."""
    return [
        {"images": line["images"]} | {n: v for n, v in line.items() if n.startswith(prefix)}
        for line in lines(folder / "metrics.jsonl")
        if any(n.startswith(prefix) for n in line)
    ]


def content(folder: Path, images: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    (place,) = (folder / "checkpoints").glob(f"checkpoint-*-{images:012d}")
    return reader.read(str(place))


def test_a_metric_is_measured_at_its_interval_and_at_the_end_and_logged_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, *GAME, own=OwnParts(metrics=[SPREAD]))
    found = measured(tmp_path, "metric/")
    assert [line["images"] for line in found] == [120, 240, 360, 480]
    assert all(line.keys() == {"images", "metric/spread", "metric/noise"} for line in found)
    assert found[-1]["metric/spread"] == pytest.approx(spread_of(content(tmp_path, 480)[1]))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("metric/spread")]
    assert shown == [(line["images"], pytest.approx(line["metric/spread"], rel=1e-6)) for line in found]
    # A checkpoint records what was measured of its own weights, and nothing older.
    assert content(tmp_path, 480)[0]["scalars"]["metric/spread"] == found[-1]["metric/spread"]
    assert "metric/spread" not in content(tmp_path, 160)[0]["scalars"]
    assert "loss/generator" in content(tmp_path, 160)[0]["scalars"]
    end = lines(tmp_path / "events.jsonl")[-1]
    assert end["metrics"] == {name: value for name, value in found[-1].items() if name != "images"}
    assert capsys.readouterr().err.count("spread ") == 4


def test_a_metric_changes_neither_the_training_nor_what_a_resumed_run_measures(tmp_path: Path) -> None:
    whole, bare, resumed = tmp_path / "whole", tmp_path / "bare", tmp_path / "resumed"
    trained(whole, *GAME, own=OwnParts(metrics=[SPREAD]))
    trained(bare, *GAME)
    with started(resumed, *GAME, own=OwnParts(metrics=[SPREAD])) as run:
        stream, honest_next = run.state.stream, run.state.stream.next

        def crash() -> Batch:
            if stream.values()["draw"] >= 50:
                raise ZeroDivisionError
            return honest_next()

        stream.next = crash  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            fit(run)
        run.saving.wait()
    trained(resumed, *GAME, attempt=2, own=OwnParts(metrics=[SPREAD]))
    assert measured(resumed, "metric/") == measured(whole, "metric/")
    expected = content(whole, 480)[1]
    for folder in (bare, resumed):
        tensors = content(folder, 480)[1]
        assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []


def test_the_default_metric_of_the_embedded_data_counts_its_modes_once_at_the_end() -> None:
    (metric,) = _metrics_of_data(load_config(None, ["run.images=480"]))
    assert (metric.name, metric.every) == ("modes", 480)
    assert _metrics_of_data(points_config()) == ()


def test_modes_are_counted_among_the_samples(tmp_path: Path) -> None:
    images, labels = draw_shapes(24, seed=3)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1

    class Memory(torch.nn.Module):
        """A generator that shows one stored picture after another."""

        latent_dim, shown = 1, 0

        def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            self.shown += len(latents)
            return pictures[self.shown - len(latents) : self.shown]

    with started(tmp_path, *GAME) as run:
        source = Samples(Memory(), run.game.draws, run.game.runtime, 0, 0)
        metric = mode_count(every=1, samples=24)
        values = measure(metric, source)
    assert values == {
        "modes_covered": len(np.unique(labels)), "modes_total": 12, "valid_fraction": 1.0,
        "smallest_share": np.bincount(labels, minlength=12).min() / 2,
    }  # fmt: skip
    assert "modes: " in metric.describe(values)
    assert "100.0% of 24 samples" in metric.describe(values)


@pytest.mark.parametrize("found", [None, 0.5, {"a": "high"}, {"a": None}], ids=str)
def test_a_metric_that_returns_no_numbers_by_name_is_refused(found: Any, tmp_path: Path) -> None:
    with started(tmp_path, *GAME) as run, pytest.raises(UserError, match="numbers by name are needed"):
        measure(Metric("odd", 1, lambda samples: found), run.samples())


@pytest.mark.parametrize("theirs", [{"share": 2.0}, {"other": 1.0}, {"share": float("nan")}], ids=str)
def test_a_metric_with_other_values_on_another_rank_is_refused(theirs: dict[str, float], tmp_path: Path) -> None:
    with started(tmp_path, *GAME) as run:
        group = run.game.runtime.control_group
        group.gather_json = lambda value: [value, theirs]  # type: ignore[method-assign]
        with pytest.raises(UserError, match="'share' has other values on rank 1 .* combine the ranks' shares"):
            measure(Metric("share", 1, lambda samples: {"share": 1.0}), run.samples())
        theirs.clear()
        theirs["share"] = 1.0 + 1e-6
        assert measure(Metric("share", 1, lambda samples: {"share": 1.0}), run.samples()) == {"share": 1.0}


def test_two_metrics_with_a_value_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'other' returns metric/noise, as another metric does"):
        trained(tmp_path, *GAME, own=OwnParts(metrics=[SPREAD, SPREAD._replace(name="other")]))


# -- health ---------------------------------------------------------------------------------------------------------


def collapse_at(images: int, *, seen: list[tuple[int, set[str]]] | None = None) -> Any:
    """A detector that finds one failure, the first time that so many images have been seen."""
    fired = []

    def detect(now: int, scalars: Scalars) -> Verdict | None:
        if seen is not None:
            seen.append((now, set(scalars)))
        if now != images or fired:
            return None
        fired.append(now)
        return Verdict("mode_collapse", f"the spread is {scalars['health/spread']:.3f}", "raise the penalties")

    return detect


def test_a_verdict_on_the_logged_scalars_rolls_the_run_back_before_it_saves(tmp_path: Path) -> None:
    seen: list[tuple[int, set[str]]] = []
    health = Metric("health", 80, spread)
    trained(tmp_path, *GAME, measures=[health], detectors=[collapse_at(400, seen=seen)])
    assert measured(tmp_path, "health/")[0].keys() == {"images", "health/spread", "health/noise"}
    assert [images for images, _ in seen] == [80, 160, 240, 320, 400, 240, 320, 400, 480]
    assert all({"loss/generator", "health/spread"} <= names for _, names in seen)
    (failure,) = [event for event in lines(tmp_path / "events.jsonl") if event["event"] == "failure"]
    assert (failure["images"], failure["phenomenon"]) == (400, "mode_collapse")
    (rollback,) = [event for event in lines(tmp_path / "events.jsonl") if event["event"] == "rollback"]
    assert (rollback["failed_at"], rollback["images"], rollback["rollbacks"]) == (400, 160, 1)
    assert lines(tmp_path / "events.jsonl")[-1]["event"] == "end"


def test_a_failure_that_comes_back_ends_the_run_with_its_remedy(tmp_path: Path) -> None:
    def collapsed(now: int, scalars: Scalars) -> Verdict | None:
        return Verdict("mode_collapse", "one mode is left", "raise the penalties") if now >= 400 else None

    with pytest.raises(TrainingFailed, match="one mode is left; the run has gone back 2 times") as failed:
        trained(tmp_path, *GAME, "recovery.rollbacks=2", detectors=[collapsed])
    assert "raise the penalties" in str(failed.value)
    assert json.dumps(lines(tmp_path / "events.jsonl")).count('"rollback"') == 2


def test_the_settings_of_a_step_are_those_that_recovery_has_softened(tmp_path: Path) -> None:
    with started(tmp_path, *GAME) as run:
        honest = run.state.recovery.soften

        def softened(knobs: Knobs) -> Knobs:
            assert honest(knobs) == knobs
            return knobs._replace(g_lr=knobs.g_lr / 4)

        run.state.recovery.soften = softened  # type: ignore[method-assign]
        fit(run)
    assert {line["knobs/g_lr"] for line in lines(tmp_path / "metrics.jsonl")} == {1e-2 / 4}
