"""What is kept of a run of two processes, and what another one may begin from: three launches for five settings."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ROOT, launch
from tests.scenarios.test_runs import assert_same_state, events


def points(run: Path, *extra: str) -> list[str]:
    """Six checkpoints, while one learning rate rises and the other falls."""
    return [
        "configs/points.yaml", f"run.dir={run}", "run.images=1536", "run.batch=64", "log.every=256", "log.samples=16",
        "checkpoint.every=256", "checkpoint.keep=2", "runtime.threads=1",
        "g_optim.lr={start: 1e-4, end: 1e-3, images: 2k}", "d_optim.lr={start: 1e-3, end: 1e-4, images: 2k}", *extra,
    ]  # fmt: skip


def kept(run: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[2]) for path in (run / "checkpoints").glob("*/COMMIT"))


def test_two_processes_keep_the_best_and_every_so_many_resume_by_url_and_begin_from_other_weights(tmp_path: Path) -> None:
    lowest, highest, weights = tmp_path / "lowest", tmp_path / "highest", tmp_path / "weights"

    done = launch(ROOT / "train.py", points(lowest, "checkpoint.keep_best=knobs/g_lr"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept(lowest) == [256, 1280, 1536], "the rate rises, so the first is the lowest"

    first = next((lowest / "checkpoints").glob("*-000000000256"))
    extra = (f"run.resume={first}", "checkpoint.keep_best=-knobs/d_lr")
    done = launch(ROOT / "train.py", points(highest, *extra), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept(highest) == [512, 1280, 1536], "the rate falls, so the first is the highest"
    assert events(highest)[0]["checkpoint"] == str(first)
    assert_same_state(lowest, highest)

    extra = (f"run.init_from={lowest}", "checkpoint.keep_every=512")
    done = launch(ROOT / "train.py", points(weights, *extra), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept(weights) == [256, 512, 1024, 1280, 1536], "one for each 512 images, and the last two"
    start = events(weights)[0]
    assert start["event"] == "start"
    assert [note.partition("; ")[0] for note in start["notes"]] == [
        "run.init_from: generator: 8 of 8 tensors taken, 100% of its weights",
        "run.init_from: discriminator: 8 of 8 tensors taken, 100% of its weights",
    ]
