"""Runs whose files are damaged, lost or of other settings: what each command says, and what a start goes on from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_gan import __main__ as program
from dist_gan import cli
from dist_gan.checkpoint import reader

SETTINGS = (
    "configs/points.yaml", "run.images=2560", "checkpoint.every=512", "checkpoint.keep=9", "log.every=512",
    "log.samples=16", "networks.width=32", "runtime.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five checkpoints, all healthy but the last."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert program.main([*SETTINGS, f"run.dir={run}"]) == 0
    assert len(list((run / "checkpoints").glob("*/HEALTHY"))) == 4
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def start(capsys: pytest.CaptureFixture[str], run: Path, *extra: str) -> tuple[int, str]:
    """Exit code of a start, and all that it said."""
    capsys.readouterr()
    code = program.main([*SETTINGS, f"run.dir={run}", *extra])
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return code, said.out + said.err


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code of a command, its standard output and its standard error."""
    capsys.readouterr()
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def checkpoint(run: Path, serial: int) -> Path:
    (found,) = (run / "checkpoints").glob(f"checkpoint-{serial:04d}-*")
    return found


def spoil(folder: Path) -> None:
    file = next(folder.glob("data-*"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another manifest, with a COMMIT that fits."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMIT").write_text(hashlib.sha256(content).hexdigest())


OTHERS = {
    "another rate": ("g_optim.lr=0.5",),
    "SGD over the moments of Adam": ("d_optim.kind=sgd",),
    "an objective with memory": ("objective.lecam=0.3",),
}


@pytest.mark.parametrize("others", list(OTHERS))
@pytest.mark.parametrize("how", ["auto", "without config.yaml", "with another config.yaml", "by URL", "by URL, moved"])
def test_no_way_to_resume_takes_other_settings(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, how: str, others: str
) -> None:
    place = run
    extra = [*OTHERS[others], "run.images=3072"]
    if how == "without config.yaml":
        (run / "config.yaml").unlink()
    elif how == "with another config.yaml":
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.5"))
    elif how.startswith("by URL"):
        place, source = tmp_path / "other", checkpoint(run, 3)
        if how.endswith("moved"):
            source = Path(shutil.copytree(source, tmp_path / "a checkpoint"))
        extra.append(f"run.resume={source}")
    code, said = start(capsys, place, *extra)
    assert code == 2
    assert "belongs to a run with other settings" in said
    assert OTHERS[others][0].partition("=")[0] in said
    if how.startswith("by URL"):
        assert f"run.init_from={source} in another run.dir" in said
    assert not list((run / "checkpoints").glob("checkpoint-0006-*"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\0", b"run: [" * 3000, b"run: {dir: 2020-13-45}"])
def test_a_damaged_config_yaml_is_written_anew_for_the_manifest_has_the_settings(
    capsys: pytest.CaptureFixture[str], run: Path, content: bytes
) -> None:
    (run / "config.yaml").write_bytes(content)
    code, said = start(capsys, run)
    assert code == 0, said
    assert "resumed from" in said
    assert "batch: 256" in (run / "config.yaml").read_text()


def test_settings_that_only_another_version_knows_are_named_and_the_run_goes_on(
    capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    def older(manifest: dict[str, Any]) -> None:
        text = (
            manifest["config"]
            .replace("  seed: 0\n", "  seed: 0\n  warm: 3\n")
            .replace("  width: 32\n", "  width: 32\n  tall: 1\n")
        )
        # A value that was allowed, of a setting that a resumed run may change; and one setting fewer.
        manifest["config"] = text.replace("  keep: 9\n", "  keep: 1\n").replace("  profile: false\n", "")

    edit_manifest(checkpoint(run, 5), older)
    code, said = start(capsys, run)
    assert code == 0, said
    for name in ("run.warm", "networks.tall"):
        assert f"the checkpoint has the setting {name}, which this version does not know" in said
    code, _, notes = asked(capsys, "sample", str(run), str(run / "x.png"), "--count", "1")
    assert code == 0
    assert "does not know networks.tall" in notes


def test_a_checkpoint_whose_settings_are_none_is_refused(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    for text in ("run: [1", "- 1", "run: {seed: -1}", "run: {seed: " + "9" * 5000 + "}", "{" * 3000, ""):
        edit_manifest(checkpoint(run, 5), lambda manifest, text=text: manifest.update(config=text))
        code, said = start(capsys, run)
        assert code == 2
        assert "checkpoint-0005" in said
        assert "is no configuration" in said


def test_a_rollback_that_was_cut_off_takes_the_next_healthy_one_where_its_target_is_damaged(
    capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    values = json.loads((checkpoint(run, 5) / "manifest.json").read_text())["values"]
    intent = {
        "target": checkpoint(run, 4).name, "recovery": values["recovery"] | {"rollbacks": 1}, "stream": values["stream"],
        "seconds": 1.0,
    }  # fmt: skip
    (run / "checkpoints" / "rollback.json").write_text(json.dumps(intent))
    spoil(checkpoint(run, 4))
    target, healthy = checkpoint(run, 4), checkpoint(run, 3)
    code, said = start(capsys, run, "run.images=3072")
    assert code == 0, said
    assert "passed over a damaged checkpoint" in said
    assert target.name in said
    assert f"resumed from {healthy}" in said
    assert not target.exists(), "what was abandoned is cleared away"
    assert healthy.exists()
    newest = reader.newest(str(run / "checkpoints")).url
    manifest = reader.read_manifest(str(newest))
    assert manifest["values"]["recovery"]["rollbacks"] == 1
    assert not (run / "checkpoints" / "rollback.json").exists()


@pytest.mark.parametrize("lacking", ["recovery", "stream", "seconds"])
def test_a_note_of_a_rollback_that_lacks_something_is_refused(
    capsys: pytest.CaptureFixture[str], run: Path, lacking: str
) -> None:
    values = json.loads((checkpoint(run, 5) / "manifest.json").read_text())["values"]
    intent = {"target": checkpoint(run, 4).name, "seconds": 1.0} | {k: values[k] for k in ("recovery", "stream")}
    del intent[lacking]
    (run / "checkpoints" / "rollback.json").write_text(json.dumps(intent))
    code, said = start(capsys, run, "run.images=3072")
    assert code == 2
    assert f"rollback.json is damaged: {lacking} is missing" in said
    assert not list((run / "checkpoints").glob("*/ABANDONED"))


def test_every_command_names_a_damaged_newest_checkpoint(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    assert asked(capsys, "verify", str(run))[0] == 0
    newest = checkpoint(run, 5)
    spoil(newest)
    (checkpoint(run, 4) / "ABANDONED").write_text("")
    (run / "checkpoints" / "checkpoint-0006-000000003072").mkdir()
    spoil(checkpoint(run, 2))
    code, out, _ = asked(capsys, "verify", str(run))
    assert code == 3
    for serial, word in ((6, "never committed"), (5, "1 problems"), (4, "abandoned"), (3, "whole"), (2, "1 problems")):
        assert [line for line in out.splitlines() if f"checkpoint-{serial:04d}" in line and word in line], (serial, out)
    assert f"{run}: 2 problems" in out
    assert asked(capsys, "verify", str(newest))[0] == 3
    code, out, _ = asked(capsys, "verify", str(checkpoint(run, 4)))
    assert (code, "abandoned" in out, "everything is as it should be" in out) == (0, True, True)
    code, out, _ = asked(capsys, "verify", str(run / "checkpoints" / "checkpoint-0006-000000003072"))
    assert (code, "never committed" in out) == (3, True)

    for arguments in (("sample", str(run), str(tmp_path / "x.png")), ("export", str(run), str(tmp_path / "generator"))):
        code, _, err = asked(capsys, *arguments)
        assert code == 0
        assert "passed over a damaged checkpoint" in err
        assert newest.name in err
    code, out, _ = asked(capsys, "inspect", str(run))
    assert code == 0
    assert newest.name in out.partition("passed over a damaged checkpoint")[2]
    code, said = start(capsys, tmp_path / "new", f"run.init_from={run}", "run.images=256")
    assert code == 0
    assert newest.name in said.partition("run.init_from: passed over a damaged checkpoint")[2]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"outcome": 3}', b"[" * 300_000])
def test_inspect_tells_of_damaged_logs_and_outcomes(
    capsys: pytest.CaptureFixture[str], run: Path, content: bytes
) -> None:
    (run / "outcome.json").write_bytes(content)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(content.replace(b'{"outcome": 3}', b'{"images": 30'))
    code, out, _ = asked(capsys, "inspect", str(run))
    assert code == 0
    assert "outcome: unknown" in out
    assert 'last line of metrics: {"images": 2560' in out


@pytest.mark.parametrize(
    ("networks", "fits"),
    [
        (("networks.width=64",), False),  # the generator's last bias alone has its shape
        (("networks.width=64", "networks.depth=1"), False),
        (("networks.latent_dim=8",), True),  # all but the generator's first layer
        (("networks.depth=4",), True),
    ],
)
def test_a_start_from_weights_of_which_the_smaller_part_fits_is_an_error(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, networks: tuple[str, ...], fits: bool
) -> None:
    code, said = start(capsys, tmp_path / "new", f"run.init_from={run}", "run.images=256", *networks)
    assert code == (0 if fits else 2), said
    assert ("does not fit these networks" in said) != fits
    assert "tensors taken" in said


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "walk.mp4", "a.b.gif", "gen.onnx", "gen.safetensors", "x.7z"])
def test_a_name_of_a_file_that_is_not_offered_makes_no_folder(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path, name: str
) -> None:
    for command, offered in (("sample", "ends in .png"), ("export", "model.safetensors and config.json")):
        code, _, err = asked(capsys, command, str(finished), str(tmp_path / name))
        assert code == 2
        assert name in err
        assert offered in err
        assert not (tmp_path / name).exists()


def test_folders_may_have_dots_in_their_names(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.jpg").mkdir()
    for name in ("run-0.5", "samples.v2", "there.jpg", "asked.jpg/", ".hidden"):
        code, _, err = asked(
            capsys, "sample", str(finished), str(tmp_path / name) + "/" * name.endswith("/"), "--count", "1"
        )
        assert code == 0, err
        assert (tmp_path / name / "sample-000000.png").exists()
