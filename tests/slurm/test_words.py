"""The words of a sweep and of `run.dir` as train.sh reads them: handed on one by one, and nothing of them is run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.test_jobs import SCRIPT


def handed_on(project: Path, tmp_path: Path, line: str, *more: str) -> tuple[list[str], str]:
    """What `train.py` would be given for a line of a sweep, and the last line that was said.

    Slurm's programs are stood for by three that name one node and write down what they were to start.
    """
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {
        "scontrol": "echo n0",
        "getent": ":",
        "srun": f"printf '%s\\0' \"$@\" >{tmp_path}/words",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "words").unlink(missing_ok=True)
    (tmp_path / "sweep.txt").write_text(line + "\n")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", SCRIPT, str(tmp_path / "sweep.txt"), *more], cwd=project, capture_output=True, text=True, timeout=60,
        check=False,
        env={"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "SLURM_CPUS_ON_NODE": "1"} | variables,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    words = (tmp_path / "words").read_text().split("\0") if (tmp_path / "words").exists() else ["train.py", ""]
    return words[words.index("train.py") + 1 : -1], done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a.yaml x.y=1  z=2", ["a.yaml", "x.y=1", "z=2"]),
        ("a.yaml 'data.url=/my photos' \"x=a b\" y=a\\ b", ["a.yaml", "data.url=/my photos", "x=a b", "y=a b"]),
        ("a.yaml g.lr='{start: 1, end: 0}' x='\"y\"'", ["a.yaml", "g.lr={start: 1, end: 0}", 'x="y"']),
        ("a.yaml 'x=$(touch ran)' `touch ran` ; touch ran", ["a.yaml", "x=$(touch ran)", "`touch", "ran`", ";", "touch", "ran"]),
        ("a.yaml x=* y=~ z=$HOME", ["a.yaml", "x=*", "y=~", "z=$HOME"]),
    ],
)  # fmt: skip
def test_a_line_is_words_as_a_shell_reads_them_and_nothing_of_it_is_run(
    line: str, words: list[str], project: Path, tmp_path: Path
) -> None:
    found, _ = handed_on(project, tmp_path, line, "last='1 2'")
    assert found == [*words, "last='1 2'", "run.dir=runs/slurm-7_1"]
    assert not (project / "ran").exists()


@pytest.mark.parametrize(
    ("value", "folder"),
    [
        ("'TOP/my run'", "TOP/my run"), ('"TOP/x"', "TOP/x"), ("'TOP/it''s'", "TOP/it's"), ("~/x", "TOP/x"),
        ("file://TOP/x", "TOP/x"),
        ("FILE://localhostTOP/x", "TOP/x"), ("TOP/a%20b", "TOP/a%20b"), (" TOP/x ", "TOP/x"), ("'TOP/$(x)'", "TOP/$(x)"),
    ],
)  # fmt: skip
def test_the_run_folder_is_the_one_that_train_will_read(
    value: str, folder: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_gan.config.reader import run_dir_of

    monkeypatch.setenv("HOME", str(tmp_path))
    argument = f"run.dir={value.replace('TOP', str(tmp_path))}"
    words, _ = handed_on(project, tmp_path, "a.yaml", argument)
    expected = folder.replace("TOP", str(tmp_path))
    assert words == ["a.yaml", argument]
    assert (Path(expected) / "slurm" / "lock").exists()
    assert run_dir_of(None, [argument]) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.yaml 'x", "a quote has no partner"), ("a.yaml run.dir=s3://b/x", "run.dir: no local folder"),
        ("a.yaml run.dir=pipe:cat", "run.dir: no local folder"), ('a.yaml \'run.dir="a\\"b"\'', "escapes are not read here"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_refused_in_one_sentence(
    line: str, message: str, project: Path, tmp_path: Path
) -> None:
    words, said = handed_on(project, tmp_path, line)
    assert not words
    assert said.startswith("dist_gan: ")
    assert message in said
