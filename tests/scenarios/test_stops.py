"""Asked to stop, restarted by the launcher, begun from other weights: whole runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, environment, launch_command
from tests.scenarios.test_runs import assert_same_state, events, final_state, outcome

TRAIN = ROOT / "train.py"
INSTRUMENTED = ROOT / "tests" / "dist" / "instrumented.py"


def small(shards: Path, run: Path, *extra: str) -> list[str]:
    return [
        "configs/dcgan-cifar10.yaml", f"data.url={shards}", f"run.dir={run}", "run.images=3200", "run.batch=32",
        "networks.resolution=16", "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8", "log.samples=4",
        "log.every=320", "checkpoint.every=640", "runtime.threads=1", "runtime.stop_every=32", *extra,
    ]  # fmt: skip


def command(script: Path, arguments: list[str], processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, str(script), *arguments]
    return launch_command(script, arguments, processes=processes)


def finish(script: Path, arguments: list[str], *, processes: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, arguments, processes), cwd=ROOT, env=environment(**more), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def workers(run: Path) -> list[int]:
    """Training processes of a run, the launcher not among them."""
    found = subprocess.run(["pgrep", "-f", f"run.dir={run}"], capture_output=True, text=True, check=False).stdout
    pids = [int(pid) for pid in found.split() if int(pid) != os.getpid()]
    return [pid for pid in pids if b"accelerate" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize(("name", "processes"), [("HUP", 1), ("INT", 1), ("USR1", 1), ("USR2", 2), ("TERM", 2)])
def test_a_run_that_is_asked_to_stop_saves_leaves_with_75_and_goes_on_as_if_nothing_had_been(
    small_shards: Path, tmp_path: Path, name: str, processes: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finish(TRAIN, small(small_shards, whole), processes=processes).returncode == 0
    process = subprocess.Popen(
        command(TRAIN, small(small_shards, run), processes), cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(workers(run)[-1], getattr(signal, f"SIG{name}"))  # one rank is told, all stop
    code = process.wait(timeout=60)
    left = outcome(run)
    assert left["outcome"] == "preempted", left
    assert left["code"] == 75
    assert left["reason"] == f"asked to stop by SIG{name}"
    assert 0 < left["images"] < 3200
    assert code == (75 if processes == 1 else 1), "a launcher turns every failure into 1"
    assert Path(left["commit"], "COMMIT").exists()
    assert events(run)[-1]["event"] == "preempted"
    assert finish(TRAIN, small(small_shards, run), processes=processes).returncode == 0
    assert events(run)[-1]["event"] == "end"
    assert_same_state(whole, run)
    images = [json.loads(line)["images"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert images == sorted(set(images)), "each point is seen once"


def test_a_restarting_launcher_resumes_from_the_last_commit_without_help(small_shards: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finish(TRAIN, small(small_shards, whole), processes=2).returncode == 0
    arguments = [str(tmp_path / "out"), "kill:120", *small(small_shards, run)]
    restarting = launch_command(INSTRUMENTED, arguments, processes=2)
    place = restarting.index(str(INSTRUMENTED))
    restarting[place:place] = ["--max_restarts", "1"]
    done = subprocess.run(
        restarting, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150, check=False
    )
    assert (tmp_path / "out" / "fault-fired").read_text() == "kill"
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert [e["attempt"] for e in events(run) if e["event"] in ("start", "resume")] == [1, 2]
    assert_same_state(whole, run)


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_end_with_a_launcher_that_is_killed_and_the_same_command_goes_on(
    small_shards: Path, tmp_path: Path, processes: int
) -> None:
    run = tmp_path / "run"
    launcher = subprocess.Popen(
        launch_command(TRAIN, small(small_shards, run, "run.images=64M"), processes=processes), cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(run.glob("checkpoints/*/COMMIT")):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers(run)) == processes
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 15
    while workers(run):
        assert time.monotonic() < deadline, workers(run)
        time.sleep(0.1)
    left = outcome(run)
    assert left["images"] > 0
    assert Path(left["commit"], "COMMIT").exists()
    assert left["outcome"] == "preempted" if processes == 1 else "has ended without its ranks" in left["reason"], left
    last = small(small_shards, run, f"run.images={left['images'] + 320}")
    assert finish(TRAIN, last, processes=processes).returncode == 0
    assert [e["event"] for e in events(run) if e["event"] in ("start", "resume", "end")] == ["start", "resume", "end"]


def test_an_interrupt_while_a_run_starts_is_one_sentence(tmp_path: Path, small_shards: Path) -> None:
    for ready in ("nothing", "folder"):
        run = tmp_path / ready
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *small(small_shards, run)], cwd=ROOT, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        time.sleep(0.5)
        while ready == "folder" and not (run / "config.yaml").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert "Traceback" not in said
        assert said.count("dist_gan: ") == 1, said
        assert "SIGINT" in said
        if ready == "folder":
            assert process.returncode == 75
            assert (outcome(run)["outcome"], outcome(run)["attempt"]) == ("preempted", 1)
        else:
            assert process.returncode == 130
            assert not run.exists()


def test_a_crash_says_how_far_it_came_and_what_is_saved(small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [str(tmp_path / "out"), "fail:100", *small(small_shards, run)]
    done = finish(INSTRUMENTED, arguments, FAULTY_RANK="0")
    assert (tmp_path / "out" / "fault-fired").read_text() == "fail"
    assert done.returncode == 1
    assert done.stdout.count("dist_gan: LookupError: a stage of its own") == 1
    left = outcome(run)
    assert left["outcome"] == "crashed"
    assert left["images"] >= 640
    assert left["commit"] in {str(path.parent) for path in run.glob("checkpoints/*/COMMIT")}


def test_one_bad_batch_is_skipped_on_all_ranks_and_training_goes_on(small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = finish(INSTRUMENTED, [str(tmp_path / "out"), "nan-once:50", *small(small_shards, run)], processes=2)
    assert (tmp_path / "out" / "fault-fired").read_text() == "nan-once"
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    story = [e["event"] for e in events(run)]
    assert story.count("skipped_update") == 1
    assert "rollback" not in story
    assert outcome(run)["outcome"] == "finished"
    tensors, manifest = final_state(run)
    assert manifest["values"]["recovery"]["skipped"] == {"discriminator": 1, "generator": 0}
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


def test_batches_that_stay_bad_on_one_rank_end_all_ranks_after_the_budget(small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    extra = ["recovery.max_nonfinite=4", "recovery.window=20", "recovery.rollbacks=1"]
    arguments = [str(tmp_path / "out"), "nan:110", *small(small_shards, run, *extra)]
    done = finish(INSTRUMENTED, arguments, processes=2)
    assert done.returncode == 1
    assert outcome(run)["code"] == 3
    story = [e["event"] for e in events(run)]
    assert story.count("rollback") == 1
    assert story[-1] == "failure"
    back = next(e for e in events(run) if e["event"] == "rollback")
    assert back["images"] < back["failed_at"]


def test_a_new_run_may_begin_with_another_ones_weights(small_shards: Path, tmp_path: Path) -> None:
    from dist_gan.cli import main

    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    assert finish(TRAIN, small(small_shards, first, "run.images=640")).returncode == 0
    done = finish(
        TRAIN, small(small_shards, second, f"run.init_from={first}", "run.images=32", "g_optim.lr=0", "d_optim.lr=0")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "run.init_from: generator: 6 of 6 tensors taken" in done.stderr
    assert "run.init_from: discriminator: 6 of 6 tensors taken" in done.stderr
    source, _ = final_state(first)
    tensors, manifest = final_state(second)
    assert manifest["images"] == 32
    for name, tensor in source.items():
        if name.startswith("ema/"):
            assert torch.equal(tensors[name], tensor), name
            assert torch.equal(tensors[name.replace("ema/", "generator/weights/")], tensor), name
        if name.startswith("discriminator/weights/"):
            assert torch.equal(tensors[name], tensor), name
    assert main(["export", str(first), str(tmp_path / "exported")]) == 0
    exported = f"run.init_from={tmp_path / 'exported'}"
    done = finish(TRAIN, small(small_shards, third, exported, "run.images=32"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "generator: 6 of 6 tensors taken" in done.stderr
    assert "discriminator: 0 of 6 tensors taken, 0% of its weights (" in done.stderr, "an export has no discriminator"
    done = finish(TRAIN, small(small_shards, tmp_path / "wider", exported, "run.images=32", "networks.g_width=8"))
    assert done.returncode == 2
    assert "does not fit these networks" in outcome(tmp_path / "wider")["reason"]
    assert "not (" in outcome(tmp_path / "wider")["reason"], "shapes that do not fit are told"
    strange = small(small_shards, tmp_path / "fourth", f"run.init_from={tmp_path}")
    done = finish(TRAIN, strange)
    assert done.returncode == 2
    assert "no committed checkpoint here" in outcome(tmp_path / "fourth")["reason"]


def test_a_run_killed_ten_times_ends_where_nobody_touched_it(small_shards: Path) -> None:
    soak = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--json", "--kills", "10", "--processes", "1"]
    options = ["--data", str(small_shards), "--resolution", "16", "--images", "8000", "--longest-s", "0.6"]
    done = subprocess.run(
        [*soak, *options], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    assert summary["kills"] == 10
    assert summary["attempts"] == 11
    assert summary["different_tensors"] == 0
    assert summary["same_values"]
