"""One small Slurm for all tests of this folder, and copies of the project that jobs are submitted from."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, launch_command
from tests.slurm.cluster import Cluster, missing


def copy_project(folder: Path) -> Path:
    """What a job needs of the checkout."""
    for name in ("dist_gan", "configs", "launch", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    return folder


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, whose embedded recipe is shortened: 640 images instead of 130,000."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    recipe = folder / "configs" / "shapes.yaml"
    text = recipe.read_text().replace("images: 130k\n  batch: 16", "images: 640\n  batch: 16")
    text = text.replace("kind: shapes", "kind: shapes\n  count: 1200")
    assert "images: 640" in text
    assert "count: 1200" in text
    recipe.write_text(text)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two idle nodes; afterwards nothing of them is left.

    The second one sees an empty disk where the first one sees the folder `private`, and a dist_gan of its own in the
    project `strange`.
    """
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "private").mkdir()
    (folder / "strange").mkdir()
    strange, other = copy_project(folder / "strange"), folder / "other-code"
    shutil.copytree(strange / "dist_gan", other)
    with open(other / "ema.py", "a") as file:
        file.write("# another version\n")
    mounts = f"mount -t tmpfs tmpfs {folder}/private; mount --bind {other} {strange}/dist_gan"
    slurm = Cluster(folder, mounts=mounts)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="session")
def recipe(small_shards: Path) -> list[str]:
    """A run of a few seconds on shards, with many checkpoints."""
    return [
        "configs/dcgan-cifar10.yaml", f"data.url={small_shards}", "run.images=6400", "run.batch=32", "networks.resolution=16",
        "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8", "log.samples=4", "log.every=320",
        "checkpoint.every=640", "runtime.threads=1", "runtime.stop_every=32",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes outside Slurm, which nobody has touched."""
    return outside_slurm(recipe, tmp_path_factory.mktemp("undisturbed"), ROOT)


def outside_slurm(arguments: list[str], run: Path, project: Path) -> Path:
    """Trains with two processes of one launcher."""
    command = launch_command(project / "train.py", [*arguments, f"run.dir={run}"], processes=2)
    subprocess.run(command, cwd=project, env=environment(), capture_output=True, timeout=120, check=True)
    return run
