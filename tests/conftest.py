"""What tests share: launching processes as a user does, and data sets made on the spot."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

# Under nohup, or in the background of a script, these would stay ignored in every process that a test starts.
for _number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL if _number == signal.SIGHUP else signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch_command(
    script: str | Path, arguments: Sequence[str], *, processes: int, config_file: str | Path | None = None
) -> list[str]:
    """`accelerate launch`: without arguments for one process, with launch/cpu.yaml for several, or as told."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1 or config_file is not None:
        command += ["--config_file", str(config_file or ROOT / "launch" / "cpu.yaml")]
        command += ["--num_processes", str(processes)]
        command += ["--main_process_port", str(free_port())]
    return [*command, str(script), *arguments]


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without what a launcher above it may have left."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("ACCELERATE_")}
    # An empty accelerate configuration, whatever this machine's user has set up for himself.
    return kept | {"HF_HOME": "/nonexistent", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | extra


def launch(
    script: str | Path,
    arguments: Sequence[str],
    *,
    processes: int = 1,
    config_file: str | Path | None = None,
    timeout_s: float = 300,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launch_command(script, arguments, processes=processes, config_file=config_file),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def random_images(count: int, *, resolution: int, seed: int = 0) -> np.ndarray:
    """Smooth colourful noise, so that every image is its own and a discriminator has something to see."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(resolution // 4, axis=1).repeat(resolution // 4, axis=2)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 labelled images of 16x16 in seven shards."""
    from dist_gan.packing.array_sources import ArraySource
    from dist_gan.packing.pack import pack

    folder = tmp_path_factory.mktemp("shards")
    labels = np.arange(700) % 5
    source = ArraySource(random_images(700, resolution=16), labels, class_names=tuple("abcde"))
    pack(source, str(folder), samples_per_shard=100, workers=1)
    return folder


@pytest.fixture(scope="session")
def cifar10_zip() -> Path:
    path = SHARED_DATA / "cifar10-train.zip"
    if not path.exists():
        pytest.skip(f"the real images are not beside this checkout: {path} is missing")
    return path
