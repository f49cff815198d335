"""What a user's mistake gets: one clear sentence with place, value and remedy, the exit code, outcome.json, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_gan import __main__ as program
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack
from tests.conftest import ROOT, environment, launch, random_images


def start(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = program.main(list(arguments))
    return code, capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str, code: int = 2) -> str:
    """Starts a run that has to be refused; returns the message, after the checks that hold for every refusal."""
    got, message = start(capsys, *arguments, f"run.dir={run}")
    assert got == code, message
    assert message.count("dist_gan:") == 1, "one message"
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["code"] == code
    assert outcome["reason"] in message
    left = {p.name for p in run.iterdir()} - {"outcome.json", "attempts.jsonl", "config.yaml"}
    assert not left, f"a refused start left {left}"
    return message


@pytest.fixture
def shards(small_shards: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage: 700 images of 16x16, 5 classes."""
    return Path(shutil.copytree(small_shards, tmp_path / "shards"))


def recipe(shards: Path, *extra: str) -> list[str]:
    return ["configs/dcgan-cifar10.yaml", f"data.url={shards}", "networks.resolution=16", *extra]


def test_three_mistakes_are_told_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(
        capsys, tmp_path / "run", "run.imagez=3", "g_optim.lr=fast", "run.batch=64", "runtime.micro_batch=7"
    )
    assert "3 mistakes" in message
    for text in (
        "run.imagez: unknown key",
        "g_optim.lr: 'fast' is no number",
        "runtime.micro_batch: 64 images a process",
    ):
        assert text in message


def test_an_unknown_key_names_the_keys_there_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "the keys of run are dir, images" in refused(capsys, tmp_path / "run", "run.image=3")


def test_a_batch_that_does_not_divide_over_the_processes_is_refused_with_one_that_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused(capsys, tmp_path / "run", "run.batch=64")
    assert "run.batch: 64 images do not divide over 3 processes; take 63" in message


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "ftp://host/x", "simplecache::s3://bucket/x", "ssh://me@host/x"]
)
def test_a_url_of_a_forbidden_scheme_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, url: str) -> None:
    message = refused(capsys, tmp_path / "run", "data.kind=shards", f"data.url={url}")
    assert "data.url:" in message
    assert "me@" not in message


def test_a_folder_without_a_manifest_is_refused_with_the_commands_that_make_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(capsys, tmp_path / "run", *recipe(tmp_path / "empty"))
    assert str(tmp_path / "empty") in message
    assert "dist-gan pack" in message
    assert "dist-gan index" in message


def test_a_manifest_of_another_data_set_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    other = tmp_path / "other"
    pack(ArraySource(random_images(700, resolution=16, seed=5)), str(other), samples_per_shard=200, workers=1)
    shutil.copy(other / "manifest.json", shards / "manifest.json")
    message = refused(capsys, tmp_path / "run", *recipe(shards))
    assert ".tar: the manifest says" in message
    assert "of another data set" in message.replace("\n", " ")


def test_a_resolution_that_the_shards_do_not_have_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    message = refused(capsys, tmp_path / "run", *recipe(shards, "networks.resolution=64"))
    assert "networks.resolution: 64" in message
    assert "set networks.resolution=16" in message


def test_grey_networks_on_coloured_shards_and_classes_that_are_not_there_are_refused_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    message = refused(capsys, tmp_path / "run", *recipe(shards, "networks.channels=1", "networks.classes=9"))
    assert "set networks.channels=3" in message
    assert "set networks.classes=5" in message


def test_the_folder_of_a_finished_run_is_left_as_it_is_by_every_start_that_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    settings = ["configs/points.yaml", "run.images=512", f"run.dir={run}"]
    done = subprocess.run(
        [sys.executable, "train.py", *settings],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    told = tmp_path / "told.json"
    monkeypatch.setenv("DIST_GAN_REFUSED", str(told))
    code, message = start(capsys, *settings, "g_optim.lr=5e-4", "objective.r1_gamma=3")
    assert code == 2
    assert "belongs to a run with other settings" in message
    assert "g_optim.lr: 0.001 -> 0.0005" in message
    assert "objective.r1_gamma: 0.1 -> 3.0" in message
    for arguments in (
        [*settings, "--dry-run", "run.x=1"],
        [*settings, "run.x=1"],
        ["configs/point.yaml", f"run.dir={run}"],
    ):
        assert start(capsys, *arguments)[0] == 2
        assert json.loads(told.read_text())["code"] == 2
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    code, message = start(capsys, *settings)
    assert code == 2
    assert json.loads(told.read_text())["reason"] in message, "a batch script learns it from the file that it has named"
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    assert after == before, "a start that is refused touches nothing that is not its own"


def test_a_refused_start_writes_into_no_folder_that_was_not_named_or_is_somebody_elses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for arguments in (
        ["run.imagez=3"], ["nowhere.yaml"], ["--dry-run", "run.imagez=3", "run.dir=new"], ["run.imagez=3", "run.dir=mine"],
        ["run.imagez=3", "run.dir=s3://bucket/x"], ["run.imagez=3", "run.dir=[a]"],
    ):  # fmt: skip
        assert start(capsys, *arguments)[0] == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["letter.txt", "mine"]


def test_a_run_folder_of_a_living_process_is_refused_and_its_outcome_left_to_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ["configs/points.yaml", "run.images=100M", f"run.dir={run}"]
    living = subprocess.Popen(
        [sys.executable, "train.py", *settings], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "events.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        code, message = start(capsys, *settings)
        assert code == 2
        assert f"{run} is in use by process {living.pid}" in message
        assert living.poll() is None
        assert not (run / "outcome.json").exists()
    finally:
        living.kill()
        living.wait()


def test_a_run_folder_that_cannot_be_made_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, message = start(capsys, f"run.dir={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert f"run.dir: cannot write in {tmp_path / 'file' / 'run'}" in message


def test_a_run_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        if shutil.which("setpriv") is None:
            pytest.skip("runs as root, and there is no setpriv to become somebody else")
    else:
        drop = []
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and os.geteuid() == 0 and str(parent).startswith(("/tmp/", str(tmp_path))):
            parent.chmod(parent.stat().st_mode | 0o055)
    locked.chmod(0o555)
    code = "import sys; from dist_gan.run_folder import RunFolder; from dist_gan.config.reader import load_config\n"
    code += (
        f"try: RunFolder(load_config(None, ['run.dir={locked}/run']))\nexcept ValueError as e: print(e); sys.exit(2)"
    )
    done = subprocess.run(
        [*drop, sys.executable, "-c", code], cwd="/", env=environment(), capture_output=True, text=True, check=False
    )
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("runs as root, and nobody else may read this checkout or its Python")
    assert done.returncode == 2, done.stderr
    assert "no write permission; choose a folder you may write to" in done.stdout


@pytest.mark.parametrize(
    ("size", "extra"),
    [("700k", ["run.images=4k", "checkpoint.every=2k"]), ("300k", ["run.images=2M", "log.every=256"])],
)
def test_a_full_disk_ends_the_run_with_one_sentence_an_outcome_and_no_checkpoint_that_looks_whole(
    tmp_path: Path, size: str, extra: list[str]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], check=False, capture_output=True
    ).returncode  # fmt: skip
    if not mounted:
        pytest.skip("a small file system can only be mounted by root")
    try:
        run = small / "run"
        done = subprocess.run(
            [sys.executable, "train.py", "configs/points.yaml", *extra, f"run.dir={run}"],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr[-2000:] + done.stdout
        assert done.stdout.count("dist_gan:") == 1
        assert "the disk is full; free some space" in done.stdout
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        left = json.loads((run / "outcome.json").read_text())
        assert (left["outcome"], left["code"], left["attempt"]) == ("failed", 3, 1)
        assert left["images"] > 0
        assert not list(run.glob("checkpoints/*/COMMIT"))
        assert not list(run.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_reader_of_the_log_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f"{sys.executable} train.py configs/points.yaml run.images=8k log.every=256 run.dir={run} 2>&1 | head -2"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == 2
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"


def test_every_checkpoint_damaged_is_an_error_and_not_a_silent_new_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ["configs/points.yaml", "run.images=1k", "checkpoint.every=512", f"run.dir={run}"]
    python = [sys.executable, "train.py", *settings]
    assert subprocess.run(python, cwd=ROOT, env=environment(), capture_output=True, check=False).returncode == 0
    newest, *older = sorted((run / "checkpoints").iterdir(), reverse=True)
    assert older
    data = next(newest.glob("*.safetensors"))
    flipped = bytearray(data.read_bytes())
    flipped[-5] ^= 1
    data.write_bytes(flipped)
    done = subprocess.run(
        [*python, "run.images=2k"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"passed over a damaged checkpoint: {data} is damaged" in done.stderr
    for data in run.glob("checkpoints/*/*.safetensors"):
        data.write_bytes(data.read_bytes()[:-1])
    done = subprocess.run(python, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "every checkpoint in" in done.stdout
    assert json.loads((run / "outcome.json").read_text())["code"] == 2


def test_an_image_that_turns_bad_after_packing_ends_the_run_and_names_it(tmp_path: Path, shards: Path) -> None:
    from dist_gan.data.manifest import read_manifest

    shard = read_manifest(str(shards)).shards[0]
    with open(shards / shard.name, "r+b") as file:
        file.seek(shard.offsets[3])
        file.write(b"\0" * shard.sizes[3])
    run = tmp_path / "run"
    settings = [*recipe(shards), f"run.dir={run}", "run.images=1400", "data.bad_images=fail"]
    done = launch(ROOT / "train.py", settings, processes=2)
    assert done.returncode == 1, "the launcher's code for any failure"
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["code"] == 3
    assert shard.name in outcome["reason"]
    assert shard.keys[3] in outcome["reason"]
    assert "dist-gan verify" in outcome["reason"]
    assert (done.stdout + done.stderr).count("dist_gan: ") == 1, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("mistake", "text"), [("run.imagez=3", "unknown key"), ("networks.resolution=64", "set networks.resolution=16")]
)
def test_a_wrong_config_and_wrong_data_under_a_launcher_are_told_once_and_last(
    tmp_path: Path, shards: Path, mistake: str, text: str
) -> None:
    began = time.monotonic()
    done = launch(ROOT / "train.py", [*recipe(shards), f"run.dir={tmp_path / 'run'}", mistake], processes=3)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert said.count(text) == 1, said
    assert "Traceback" not in said[said.rindex(text) :], said
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["code"] == 2
    assert "SIGKILL" not in said, "every rank left by itself"
    assert time.monotonic() - began < 60


def test_dry_run_and_help_touch_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, shown = start(capsys, "--dry-run", f"run.dir={tmp_path / 'run'}")
    assert code == 0
    assert "parameters" in shown
    assert "16 images = 1 processes x 1 micro-batches x 16" in shown
    assert not (tmp_path / "run").exists()
    code, shown = start(capsys, "--help")
    assert code == 0
    assert "runtime.micro_batch" in shown
    assert np.all([name in shown for name in ("networks.dropout", "objective.r1_gamma", "data.url")])
