"""The loop on two ranks: one of them is asked to stop, one of them writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_gan.own_parts import OwnParts
from dist_gan.checkpoint import reader
from tests.conftest import ROOT, launch
from tests.dist.loop_worker import ORDERED
from tests.games import lines, trained

GAME = (
    "run.images=480", "checkpoint={every: 40, keep: 100}", "log.every=40", "log.samples=4", "runtime.stop_every=56",
    "objective={kind: hinge, lecam: 0.1, r1_gamma: 0.2}", "g_optim.lr=1e-2", "d_optim.lr=1e-2", "ema.half_life=50",
)  # fmt: skip


def test_a_request_on_any_rank_stops_all_at_one_step_and_what_is_logged_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    run.mkdir()
    done = launch(ROOT / "tests" / "dist" / "loop_worker.py", [str(run), *GAME], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((run / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["asked"] for report in reports] == [None, "SIGUSR1"]
    # Asked in the 12th step, at 96 images; looked for at 112.
    commit = str(run / "checkpoints" / "checkpoint-0003-000000000112")
    assert [report["end"] for report in reports] == [[112, "SIGUSR1", commit]] * 2
    assert done.stderr.count("112/480 images") + done.stderr.count("80/480 images") == 1, "one rank says how it goes"
    assert done.stderr.count("asked to stop") == 1
    metrics = lines(run / "metrics.jsonl")
    assert [tick["images"] for tick in metrics] == [40, 40, 80, 80], "a line of the losses, and one of the metric"
    assert {"metric/sum", "metric/weighted"} <= metrics[-1].keys()
    assert [event["event"] for event in lines(run / "events.jsonl")] == ["start", *["checkpoint"] * 3, "preempted"]

    trained(alone, *GAME, "run.images=112", own=OwnParts(metrics=(ORDERED,)))
    for ours, expected in zip(metrics, lines(alone / "metrics.jsonl"), strict=False):
        learned = {name for name in expected if not name.startswith("time/")}
        assert ours.keys() == expected.keys()
        assert {n: ours[n] for n in learned} == pytest.approx({n: expected[n] for n in learned}, rel=1e-6, abs=1e-9)
    values, expected_values = (
        reader.read(str(folder / "checkpoints" / "checkpoint-0003-000000000112"))[0]["values"]
        for folder in (run, alone)
    )
    for value in (values, expected_values):
        value["progress"].pop("seconds")
    assert values == expected_values
