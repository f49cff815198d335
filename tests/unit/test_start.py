"""What a start refuses in one report, and what a command does with a path, a launch or an error that is odd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_gan import __main__ as program
from dist_gan import cli, wording
from dist_gan.checkpoint.reader import list_checkpoints
from dist_gan.config.reader import load_config
from dist_gan.config.rules import logged_scalars
from dist_gan.models import build_networks, count_parameters, sizes
from dist_gan.process import start
from dist_gan.project import EMBEDDED_RECIPE
from dist_gan.types import UserError


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert program.main(list(arguments)) == code
    told = capsys.readouterr()
    return told.out + told.err


# -- one report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rehearsal", [["--dry-run"], []])
def test_mistakes_in_settings_networks_and_data_come_in_one_report(
    rehearsal: list[str], small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = said(
        capsys, *rehearsal, "data.kind=shards", f"data.url={small_shards}", "networks.resolution=64", "run.bach=3",
        f"data.mix={{{tmp_path}/none: 1}}", "networks.classes=9", f"run.dir={tmp_path}/run",
    )  # fmt: skip
    assert message.count("dist_gan:") == 1
    assert "4 mistakes in the configuration" in message
    for text in ("run.bach: unknown", "set networks.resolution=16", "set networks.classes=5", "data.mix: "):
        assert f"\n  {text.split(': ')[0].split('=')[0].removeprefix('set ')}" in message
        assert text in message
    assert (tmp_path / "run" / "outcome.json").exists() == (not rehearsal)


def test_a_rehearsal_looks_at_the_data_and_starts_nothing(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dry-run", "data.kind=shards", "networks.resolution=16", f"run.dir={tmp_path}/run"]
    assert "# generator" in said(capsys, *arguments, f"data.url={small_shards}", code=0)
    assert "data.url: " in said(capsys, *arguments, f"data.url={tmp_path}/none")
    assert not (tmp_path / "run").exists()


def test_data_are_not_compared_with_what_stands_in_for_a_wrong_setting(
    small_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = said(capsys, "--dry-run", "data.kind=shards", f"data.url={small_shards}", "networks.resolution=17")
    assert "1 mistake in" in message
    assert "networks.resolution: 17" in message


def test_networks_that_no_machine_holds_are_refused_before_they_are_built(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.kind=points", "networks.kind=mlp", "networks.width=65536", "networks.depth=256"]
    for flag in ([], ["--dry-run"]):
        message = said(capsys, *flag, *overrides, "objective.r1_gamma=0", "objective.r2_gamma=0")
        assert "networks: 2," in message
        assert "choose smaller widths" in message


@pytest.mark.parametrize("kind", ["dcgan", "article", "mlp"])
def test_sizes_without_memory_are_those_of_the_networks(kind: str) -> None:
    section = load_config(None, ["data.kind=points"] * (kind == "mlp") + [f"networks.kind={kind}"]).networks
    networks = build_networks(section, seed=0)
    assert sizes(section) == (count_parameters(networks.generator), count_parameters(networks.discriminator))


# -- the launch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"), ({"WORLD_SIZE": "x"}, "WORLD_SIZE"), ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"), ({"WORLD_SIZE": "1e3"}, "WORLD_SIZE"), ({"WORLD_SIZE": "\u0663"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"), ({"RANK": "1"}, "RANK"), ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "-1"}, "RANK"), ({"LOCAL_RANK": "1"}, "LOCAL_RANK"), ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"), ({"WORLD_SIZE": "2\x1b[31m"}, "WORLD_SIZE"),
    ],
)  # fmt: skip
def test_an_odd_launch_is_one_sentence(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    (line,) = said(capsys, "--dry-run").splitlines()
    assert line.startswith(f"dist_gan: {name}: ")
    assert line.isprintable()
    assert len(line) < 500


def test_a_launch_is_read_as_it_is() -> None:
    assert start.place_in_launch({}) == (0, 1)
    assert start.place_in_launch({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == (3, 4)


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["sample", "RUN"], ["export", "RUN"], ["pack", "RUN"]])
@pytest.mark.parametrize("spelling", ["~/out.png", "file://~/out.png"])
def test_a_command_takes_a_path_in_any_spelling_and_leaves_no_folder_of_that_name(
    command: list[str], spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen = cli._parser().parse_args([*command, spelling])
    cli._settle_places(seen)
    assert seen.dest == f"{tmp_path}/home/out.png"
    assert cli.main([*command, spelling]) in (2, 3)
    assert not list(tmp_path.iterdir())


def test_pictures_are_not_written_to_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "run", "s3://bucket/out.png"]) == 2
    assert "DEST: 's3://bucket/out.png' is no local path; give a path on a disk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["a\0b", "a\nb", "a\x1b[31m", "\udcff", "", "file://"])
def test_a_path_that_cannot_be_one_is_a_sentence(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["verify"], ["index"], ["export", "run"], ["pack", "x"]):
        assert cli.main([*command, place]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.isprintable()


@pytest.mark.parametrize(
    "place", ["run.dir=FILE", "run.dir=FILE/x", "FOLDER", "data.disk_cache=FILE", "a\0b", "FILE/x.yaml"]
)
def test_a_file_where_a_folder_is_meant_is_a_sentence(
    place: str, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    place = place.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))
    shards = ["data.kind=shards", f"data.url={small_shards}", "networks.resolution=16", "run.images=64", "run.batch=16"]
    message = said(capsys, *shards, f"run.dir={tmp_path}/run", place)
    assert message.count("dist_gan:") == 1
    assert "Traceback" not in message


# -- the last resort --------------------------------------------------------------------------------------------------


def test_an_unforeseen_error_is_one_sentence_and_its_traceback_comes_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise KeyError("s3://u:SECRET@b\ndist_gan: finished\x1b[31m")

    monkeypatch.setattr(start, "settings", breaks)
    monkeypatch.setattr(cli, "_settle_places", breaks)
    for main, arguments in ((program.main, []), (cli.main, ["inspect", "x"])):
        for asked in ("", "0", "1"):
            monkeypatch.setenv(wording.TRACEBACK, asked)
            assert main(arguments) == 1
            shown = capsys.readouterr().err
            assert "SECRET" not in shown
            assert "\x1b" not in shown
            assert sum(line.startswith(("dist_gan:", "dist-gan:")) for line in shown.splitlines()) == 1
            assert ("Traceback" in shown) == (asked == "1")
            assert (f"{wording.TRACEBACK}=1" in shown) == (asked != "1")


def test_a_name_that_the_terminal_cannot_show_does_not_end_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr("sys.stdout", out)
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert cli.main(["inspect", str(tmp_path)]) == 2
        cli._show("class é")
    assert (tmp_path / "out").read_bytes() == b"class \\xe9\n"


# -- what keep_best may name ------------------------------------------------------------------------------------------

POINTS = ["data.kind=points", "networks.kind=mlp", "run.batch=16", "objective.penalty_every=1"]
GAMES = {
    "plain": [*POINTS, "objective.r1_gamma=0", "objective.r2_gamma=0"],
    "penalised": [
        *POINTS, "objective.kind=wasserstein", "objective.r1_gamma=0.1", "objective.gradient_penalty=1", "objective.lecam=0.1",
        "objective.r2_gamma={start: 0, end: 0.1, images: 16}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("game", sorted(GAMES))
def test_a_run_may_keep_its_best_by_whatever_its_checkpoints_hold_and_by_nothing_else(
    game: str, tmp_path: Path
) -> None:
    overrides = [*GAMES[game], "run.images=48", "log.samples=4", "runtime.threads=1", f"run.dir={tmp_path}"]
    config = load_config(EMBEDDED_RECIPE, [*overrides, "checkpoint.keep_best=-logits/real"])
    assert program.main([*overrides, "checkpoint.keep_best=-logits/real"]) == 0
    (_, name), *_ = list_checkpoints(str(tmp_path / "checkpoints"))
    scalars = json.loads((tmp_path / "checkpoints" / name / "manifest.json").read_text())["scalars"]
    assert set(scalars) == set(logged_scalars(config))
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert set(scalars) <= set(logged)
    for wrong in (
        "metric/fid",
        "penalty/r3",
        "time/seconds",
        "loss",
        "-",
        "--loss/generator",
        "penalty/r1" * (game == "plain"),
    ):
        with pytest.raises(UserError, match=r"checkpoint\.keep_best: .* names no scalar|at least 1 character"):
            load_config(EMBEDDED_RECIPE, [*overrides, f"checkpoint.keep_best={wrong!r}"])
