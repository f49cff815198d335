"""Odd inputs that a person or an archive can give: each ends in one sentence, at once, and in no file of others."""

from __future__ import annotations

import fcntl
import json
import os
import time
import zipfile
from pathlib import Path

import pytest

from dist_gan import attempts, cli
from dist_gan.attempts import NOBODY
from dist_gan.config import RunConfig
from dist_gan.config.reader import load_config
from dist_gan.data.manifest import Manifest, Shard
from dist_gan.packing.listing import File, folders_of, list_images
from dist_gan.packing.sources import open_source
from dist_gan.run_folder import RunFolder
from dist_gan.sampling import MAX_PICTURES, _is_grid, write_samples
from dist_gan.types import UserError
from dist_gan.wording import safe

WORDS = ("a" * 50_000, "+" * 50_000, "a." * 25_000 + "://", ",k:x" * 12_500, "@" + ",k:x" * 12_500)


@pytest.mark.parametrize("text", WORDS, ids=lambda text: text[:6])
def test_long_text_is_made_safe_in_a_time_that_grows_with_its_length(text: str) -> None:
    started = time.process_time()
    safe(text)
    assert time.process_time() - started < 3  # looking again at each sign took fifteen


def test_no_argument_of_the_command_that_is_not_understood_shows_a_secret_or_an_escape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for odd in (["--count", "s3://k:SECRET@b"], ["--bogus", "s3://k:SECRET@b/\x1b[31m"], ["--seed=s3://k:SECRET@b"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["sample", "run", "out.png", *odd])
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert "SECRET" not in told
        assert "\x1b" not in told


@pytest.mark.parametrize(
    ("count", "steps"), [(10**12, 0), (10**30, 0), (2, 10**11), (MAX_PICTURES + 1, 0), (1, MAX_PICTURES + 1)]
)
def test_more_pictures_than_fit_into_memory_are_refused_before_any_is_made(count: int, steps: int) -> None:
    with pytest.raises(UserError, match=f"at once \\({MAX_PICTURES:,}\\)"):
        list(write_samples(None, "o.png", count=count, steps=steps))  # type: ignore[arg-type] - none is asked for


def test_a_slash_at_the_end_makes_a_folder_of_a_name_like_a_picture() -> None:
    assert not _is_grid("x.png/")
    assert _is_grid("x.PNG")
    assert _is_grid("x/.png")


def test_an_export_under_a_name_that_no_disk_takes_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(tmp_path), str(tmp_path / ("a" * 300))]) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


def test_an_exported_description_that_is_a_link_to_nowhere_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").symlink_to(tmp_path / "absent")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "a link that leads nowhere" in capsys.readouterr().err


def test_a_name_in_a_zip_that_begins_with_a_slash_is_refused_and_not_gone_down_into_without_end(tmp_path: Path) -> None:
    for names in (["/0.png"], ["/a/0.png", "/a/1.png"], ["//0.png"]):
        with pytest.raises(UserError, match="leaves the folder"):
            list_images([File(n, 1) for n in names], [], place="z", read=lambda name: b"")


def test_a_path_in_a_zip_that_is_deeper_than_any_folder_is_refused_before_its_folders_are_listed(
    tmp_path: Path,
) -> None:
    place = tmp_path / "z.zip"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("a/" * 30_000 + "0.png", b"")
    with pytest.raises(UserError, match=r"z\.zip: the file name 'a/a/.*30,000 folders"):
        open_source(str(place))
    with pytest.raises(UserError, match="signs"):
        folders_of(["a" * 5000 + "/0.png"], place="z")
    assert len(folders_of(["a/" * 60 + "0.png"], place="z")) == 60


def test_a_log_of_attempts_that_is_a_link_leaves_the_file_that_it_leads_to_as_it_is(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("chapter 1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attempts.jsonl").symlink_to(precious)
    with pytest.raises(UserError, match=r"attempts\.jsonl is a symbolic link"):
        RunFolder(_config(tmp_path / "run"))
    assert precious.read_text() == "chapter 1"


@pytest.mark.parametrize(
    ("by", "named"),
    [("process 7 on h", "process 7 on h"), ("x" * 100_000, "another process"), (b"\xff", "another process")],
)
def test_whoever_holds_a_run_folder_is_named_in_one_short_line_whatever_stands_in_it(
    tmp_path: Path, by: str | bytes, named: str
) -> None:
    claim = NOBODY._replace(attempt=1, run="a", token="b", by=by if isinstance(by, str) else "")._asdict()
    with open(tmp_path / "attempts.jsonl", "wb") as lock:
        lock.write(json.dumps(claim).encode() + b"\n" if isinstance(by, str) else by)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"is in use by {named};") as refused:
            RunFolder(_config(tmp_path))
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


def test_the_last_claim_says_whose_a_run_is(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = RunFolder(_config(tmp_path))
        assert attempts.read(tmp_path).owner == folder.claim
        assert (folder.claim.attempt, folder.claim.by) == (number, f"process {os.getpid()} on {os.uname().nodename}")
        folder.close()
    first, second = attempts.read(tmp_path).claims
    assert first.run == second.run
    assert first.token != second.token


def test_a_folder_of_a_mixture_is_the_same_one_with_a_slash_at_its_end_or_a_detour() -> None:
    shards = ["data.kind=shards", "data.url=/x"]
    for other in ("/x/", "/x/.", "/y/../x", "file:///x/"):
        with pytest.raises(UserError, match=r"data\.mix: .* is data\.url too"):
            load_config(None, [*shards, f"data.mix={json.dumps({other: 1})}"])
        with pytest.raises(UserError, match="two of these are the same one"):
            load_config(None, ["data.kind=shards", "data.url=/z", f"data.mix={json.dumps({other: 1, '/x': 1})}"])
    config = load_config(None, [*shards, f"data.mix={json.dumps({'/xx': 1, '/y/x': 1})}"])
    assert len(config.data.sources) == 3  # type: ignore[union-attr]


def test_the_home_of_nobody_is_no_folder_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"run\.dir: '~nobody-of-this-name/x' does not fit"):
        load_config(None, ["run.dir=~nobody-of-this-name/x"])
    assert cli.main(["verify", "~nobody-of-this-name/x"]) == 2
    assert "nobody who is known here" in capsys.readouterr().err
    assert load_config(None, ["run.dir=./~x"]).run.dir == "./~x"


def _config(folder: Path) -> RunConfig:
    return load_config(None, ["data.kind=points", "networks.kind=mlp", f"run.dir={folder}"])


def test_a_million_classes_are_counted_and_the_first_thousand_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest(
        resolution=16, channels=3, classes=tuple(map(str, range(2**18))), origin="",
        shards=(Shard("a.tar", 1024, "0" * 64, ("k",), (512,), (1,), ("png",), labels=(2**18 - 1,), crc32=None),),
    )  # fmt: skip
    cli._describe_shards(str(tmp_path), manifest)
    told = capsys.readouterr().out
    assert "262,144 classes: 0 0, 1 0" in told
    assert "999 0, and 261,144 more" in told
    assert len(told) < 20_000


def test_a_file_of_another_host_is_no_folder_of_that_name_here(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("file://host/x", "FILE://runs/x", "file://k:SECRET@host/x"):
        with pytest.raises(UserError, match=r"run\.dir: .*three slashes") as refused:
            load_config(None, [f"run.dir={url}"])
        assert "SECRET" not in str(refused.value)
        assert cli.main(["verify", url]) == 2
    assert "SECRET" not in capsys.readouterr().err
    for url in ("file:///a", "file:a", "file://localhost/a", "file:/a"):
        load_config(None, [f"run.dir={url}"])


def test_a_file_in_the_place_of_a_run_is_called_one_and_not_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    assert cli.main(["export", str(tmp_path / "photo.jpg"), str(tmp_path / "out")]) == 2
    assert "photo.jpg: is a file; give a run folder" in capsys.readouterr().err
