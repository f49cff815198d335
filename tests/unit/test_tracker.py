"""What a run leaves for those who watch, line by line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_gan.tracker import Tracker

CLOCK = {"time/images_per_second": 50.0, "time/data_wait_share": 0.25, "time/peak_memory_gib": 1.5}


def tracker(
    folder: Path, *, attempt: int = 1, resumed_at: int = 0, enabled: bool = True, total: int = 7_600
) -> Tracker:
    return Tracker(
        folder, enabled=enabled, attempt=attempt, total=total, resumed_at=resumed_at, config_yaml="run: {}\n"
    )


def logged(folder: Path, *ticks: int, **start: int) -> Tracker:
    """A tracker that has written a line for each of these numbers of images, and is still open."""
    found = tracker(folder, **start)
    for images in ticks:
        found.scalars(images, {"loss/generator": images / 100}, clock={"time/seconds": float(images)})
    return found


def line(images: int, attempt: int) -> str:
    value = {"images": images, "attempt": attempt, "loss/generator": images / 100, "time/seconds": float(images)}
    return json.dumps(value) + "\n"


def steps_in_tensorboard(folder: Path) -> list[int]:
    """What TensorBoard shows. It reads files in the order of their names, in which 10 stands before 9 within a second."""
    files = sorted((folder / "tensorboard").iterdir(), key=lambda file: int(file.name.rsplit(".", 1)[1]))
    for number, file in enumerate(files):
        file.rename(file.with_name(f"events.out.tfevents.{number:06d}"))
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [event.step for event in board.Scalars("loss/generator")]


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint_and_sets_the_later_ones_aside(tmp_path: Path) -> None:
    logged(tmp_path, 100, 200, 300, 301, 400).close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"images": 500, "att')  # a killed process was writing it
    resumed = logged(tmp_path, 310, 400, attempt=2, resumed_at=300)
    resumed.close()
    kept = [line(images, 1) for images in (100, 200, 300)] + [line(images, 2) for images in (310, 400)]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)
    aside = (tmp_path / "metrics.before-attempt-0002.jsonl").read_text()
    assert aside.rstrip("\n") == line(301, 1) + line(400, 1) + '{"images": 500, "att'
    assert len(list(tmp_path.glob("metrics*"))) == 2
    assert steps_in_tensorboard(tmp_path) == [100, 200, 300, 310, 400]


def test_a_run_that_goes_on_where_its_log_ends_sets_nothing_aside(tmp_path: Path) -> None:
    logged(tmp_path, 100, 200).close()
    logged(tmp_path, 300, attempt=2, resumed_at=200).close()
    assert (tmp_path / "metrics.jsonl").read_text() == line(100, 1) + line(200, 1) + line(300, 2)
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]
    assert steps_in_tensorboard(tmp_path) == [100, 200, 300]


def test_every_rollback_sets_aside_what_came_after_its_target_in_a_file_of_its_own(tmp_path: Path) -> None:
    found = logged(tmp_path, 100, 200, 300, attempt=3)
    found.rewind(200)
    found.scalars(250, {"loss/generator": 2.5}, clock={"time/seconds": 250.0})
    found.rewind(100)
    found.scalars(150, {"loss/generator": 1.5}, clock={"time/seconds": 150.0})
    found.close()
    assert (tmp_path / "metrics.jsonl").read_text() == line(100, 3) + line(150, 3)
    assert (tmp_path / "metrics.before-rollback-0003-01.jsonl").read_text() == line(300, 3)
    assert (tmp_path / "metrics.before-rollback-0003-02.jsonl").read_text() == line(200, 3) + line(250, 3)
    assert steps_in_tensorboard(tmp_path) == [100, 150]


def test_events_are_never_set_aside_and_carry_their_attempt(tmp_path: Path) -> None:
    for attempt, images in ((1, 900), (2, 100)):
        found = tracker(tmp_path, attempt=attempt, resumed_at=images)
        found.event("start", images=images, checkpoint=None)
        found.rewind(0)
        found.close()
    lines = [json.loads(text) for text in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["images"], e["attempt"], e["checkpoint"]) for e in lines] == [
        ("start", 900, 1, None),
        ("start", 100, 2, None),
    ]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    found = logged(tmp_path, 100)
    found.event("start", images=0)
    assert (tmp_path / "metrics.jsonl").read_text() == line(100, 1)
    assert json.loads((tmp_path / "events.jsonl").read_text())["event"] == "start"
    found.close()


@pytest.mark.parametrize(
    ("seconds_left", "left"),
    [(-30, "0m00s"), (0, "0m00s"), (72, "1m12s"), (3_599, "59m59s"), (2 * 3600 + 5 * 60 + 59, "2h05m")],
)
def test_the_line_of_progress_says_what_is_left_at_this_speed(
    seconds_left: int, left: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, images = tracker(tmp_path, total=1_000_000), 1_000_000 - 50 * seconds_left
    found.progress(images, {"loss/discriminator": 0.7, "loss/generator": 1.25, "skipped/generator": 0.0}, clock=CLOCK)
    found.close()
    shown = capsys.readouterr().err
    assert f"{images:,}/1,000,000 images" in shown
    assert "50.0 img/s" in shown
    assert "D 0.700 G 1.250 wait 25.0% mem 1.50 GiB" in shown
    assert shown.rstrip().endswith(f"left {left}")
    assert "skipped" not in shown


def test_the_line_of_progress_counts_the_skipped_updates_of_both_players(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tracker(tmp_path)
    found.progress(100, {"skipped/generator": 3.0, "skipped/discriminator": 4.0}, clock=CLOCK)
    found.close()
    assert "skipped 7" in capsys.readouterr().err


def test_a_rank_that_is_not_to_write_writes_and_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = tracker(tmp_path / "run", enabled=False)
    silent.scalars(100, {"loss/generator": 1.0}, clock=CLOCK)
    silent.progress(100, {}, clock=CLOCK)
    silent.event("start", images=0)
    silent.say("a word")
    assert silent.grid("generated", 100, np.zeros((4, 2, 2, 3), np.uint8)) is None
    silent.rewind(0)
    silent.flush()
    silent.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_grid_holds_every_sample_row_by_row(tmp_path: Path) -> None:
    samples = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((1, 2, 2, 3), 20, np.uint8)
    found = tracker(tmp_path)
    path = found.grid("generated", 1234, samples)
    found.close()
    assert path == tmp_path / "samples" / "generated-000000001234.png"
    pixels = np.asarray(Image.open(path).convert("L"))
    firsts = list(dict.fromkeys(int(v) for v in pixels.flatten() if v in range(20, 161, 20)))
    assert firsts == list(range(20, 161, 20))
