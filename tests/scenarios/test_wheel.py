"""A user who has the wheel and no checkout: trains, samples, and gets a project folder to go on from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from dist_gan import cli
from dist_gan.project import NAMES
from tests.conftest import ROOT, environment, free_port

TINY = [
    "run.images=256",
    "run.batch=16",
    "networks.g_width=4",
    "networks.d_width=4",
    "log.samples=4",
    "runtime.threads=1",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment whose only dist_gan is that of the wheel.

    It finds the other packages in this environment's folder. Python does not follow the .pth files of a folder that is
    itself named in a .pth file, so an editable installation of the checkout is not on the path.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, env=environment(), check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], env=environment(), check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


def in_folder(folder: Path, *command: str | Path) -> str:
    """Output of a command that has to succeed, run in `folder` without the checkout on Python's path."""
    found = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=found, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def named_files(text: str) -> set[str]:
    """Paths of the project folder that a text names; NAME and FILE are placeholders."""
    found = set(re.findall(r"(?<![\w/.])(?:(?:configs|launch|slurm|docs)/[\w.-]+\.\w+|train\.py)", text))
    return {path for path in found if not re.search(r"\b(NAME|FILE)\b", path)}


def test_the_wheel_trains_in_an_empty_folder_and_lays_out_a_project_that_trains(
    installed: Path, tmp_path: Path
) -> None:
    launch = [installed / "python", "-m", "accelerate.commands.launch"]
    in_folder(tmp_path, *launch, "-m", "dist_gan", *TINY, "data.count=120", "run.dir=run")
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "finished"
    origin = "import dist_gan, sys; print(dist_gan.__file__, *sys.path, sep='\\n')"
    places = in_folder(tmp_path, installed / "python", "-c", origin).splitlines()
    assert places[0].startswith(str(installed.parent))
    assert str(ROOT) not in places

    in_folder(tmp_path, installed / "dist-gan", "sample", "run", "samples.png", "--count", "4")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")

    told = in_folder(tmp_path, installed / "dist-gan", "init", "my project")
    assert "cd 'my project'" in told
    project = tmp_path / "my project"
    for name in NAMES:
        originals = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).iterdir())
        for file in originals:
            if file.name != "__pycache__":
                assert (project / file.relative_to(ROOT)).read_bytes() == file.read_bytes()

    several = ["--config_file", "launch/cpu.yaml", "--num_processes", "2", "--main_process_port", str(free_port())]
    points = ["run.images=512", "run.batch=64", "log.samples=16", "runtime.threads=1", "run.dir=runs/it"]
    in_folder(project, *launch, *several, "train.py", "configs/points.yaml", *points)
    assert json.loads((project / "runs" / "it" / "outcome.json").read_text())["outcome"] == "finished"

    in_folder(project, "bash", "-n", "slurm/train.sh")
    for file in (*project.glob("slurm/*"), *project.glob("launch/*"), *project.glob("configs/*")):
        absent = {path for path in named_files(file.read_text()) if not (project / path).exists()}
        assert not absent, f"{file.name} names {absent}"


def test_the_module_and_train_py_show_the_same_help(tmp_path: Path) -> None:
    shown = [
        subprocess.run(
            [sys.executable, *program, "--help"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for program in (["-m", "dist_gan"], [str(ROOT / "train.py")])
    ]
    assert shown[0] == shown[1]
    assert "run.batch = " in shown[0]


def test_a_project_folder_is_laid_beside_other_files_and_overwrites_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "notes.txt"])
    assert not list(tmp_path.rglob("__pycache__"))
    (tmp_path / "configs" / "points.yaml").write_text("mine")
    (tmp_path / "train.py").unlink()
    (tmp_path / "launch").rename(tmp_path / "launch-2")
    capsys.readouterr()
    assert cli.main(["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"dist-gan: {tmp_path}: holds configs, slurm, docs already, and nothing is overwritten; give another folder, or "
        f"move them away\n"
    )
    assert (tmp_path / "configs" / "points.yaml").read_text() == "mine"
    assert not (tmp_path / "train.py").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_project_folder_that_cannot_be_made_is_one_sentence(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main(["init", str(tmp_path / place)]) == 2
    assert re.fullmatch(r"dist-gan: \S+: cannot be made \([\w ]+\); give another folder\n", capsys.readouterr().err)


def test_a_full_disk_leaves_no_half_of_a_project(tiny_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", str(tiny_disk)]) == 3
    assert "cannot be written to (No space left on device)" in capsys.readouterr().err
    assert not list(tiny_disk.iterdir())
