"""What the program wrote and reads again may hold anything by now: one sentence, or left out and counted, never a traceback."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dist_gan import records, storage
from dist_gan.attempts import Claim, note_end, note_start
from dist_gan.config.reader import load_config
from dist_gan.records import Damaged, Record
from dist_gan.run_folder import RunFolder
from dist_gan.run_mirror import sees_claim
from dist_gan.tracker import Tracker
from dist_gan.types import TrainingFailed, UserError

ODD_LINES = {
    "half a line": b'{"images": 3, "atte',
    "zeros of a power cut": b"\0" * 40,
    "no UTF-8": b'{"images": "\xff\xfe"',
    "deep nesting": b"[" * 200_000,
    "a number of 5,000 digits": b'{"images": ' + b"9" * 5000 + b"}",
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "a name twice": b'{"images": 1, "images": 2, "attempt": 1}',
    "a line of two MiB": b'{"images": "' + b"x" * 2**21 + b'"}',
    "an empty line": b"",
}
ODD_VALUES = {
    "images as text": b'{"images": "64", "attempt": 1}',
    "images as a list": b'{"images": [64], "attempt": 1}',
    "images that are NaN": b'{"images": NaN, "attempt": 1}',
    "images below zero": b'{"images": -500, "attempt": 1}',
    "an attempt that is a list": b'{"attempt": [], "images": 0}',
    "no attempt": b'{"images": 0}',
    "an attempt that is true": b'{"attempt": true, "ended": "finished"}',
    "neither images nor an end": b'{"attempt": 1}',
}


def odd_count(odd: bytes) -> int:
    return len(odd) // records.LINE_LIMIT + 1  # a long line counts once a piece


def run_folder(run: Path) -> RunFolder:
    return RunFolder(load_config("configs/points.yaml", [f"run.dir={run}"]))


def tracker(run: Path, *, resumed_at: int, attempt: int = 2) -> Tracker:
    return Tracker(run, enabled=True, attempt=attempt, total=100, resumed_at=resumed_at, config_yaml="")


@pytest.mark.parametrize("odd", [*ODD_LINES.values(), *ODD_VALUES.values()], ids=[*ODD_LINES, *ODD_VALUES])
@pytest.mark.parametrize("at_the_end", [True, False], ids=["at the end", "in the middle"])
def test_an_odd_line_of_the_attempts_is_left_out_and_those_after_it_count(
    tmp_path: Path, odd: bytes, at_the_end: bool
) -> None:
    run = tmp_path / "run"
    for number in (1, 2):
        folder = run_folder(run)
        assert folder.attempt == number
        assert note_start(run, attempt=number, images=0, limit=9) is None
        if number == 1:
            with open(run / "attempts.jsonl", "ab") as file:
                file.write(odd + (b"" if at_the_end else b"\n"))
        folder.close()
    folder = run_folder(run)
    if odd or not at_the_end:
        assert folder.notes == [f"{run / 'attempts.jsonl'}: {odd_count(odd)} odd lines are left out"]
    folder.close()
    assert "2 attempts in a row began at 0 images" in str(note_start(run, attempt=3, images=0, limit=2))
    note_end(run, attempt=2, outcome="preempted")
    assert note_start(run, attempt=4, images=0, limit=2) is None


@pytest.mark.parametrize("odd", [b"", b"x", b"-3", b"9" * 5000, b"\xff", b"1 2", b"\0\0"])
def test_an_odd_counter_of_attempts_is_named_and_counted_anew_from_the_log(tmp_path: Path, odd: bytes) -> None:
    run = tmp_path / "run"
    for number in (1, 2, 3):
        folder = run_folder(run)
        note_start(run, attempt=number, images=number, limit=9)
        folder.close()
    (run / "attempts").write_bytes(odd)
    assert not sees_at_once(run, folder.claim._replace(attempt=4))
    folder = run_folder(run)
    assert folder.attempt == 4
    assert [note for note in folder.notes if str(run / "attempts") in note]
    assert sees_claim(run, folder.claim)
    folder.close()


def sees_at_once(run: Path, claim: Claim) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_gan.run_mirror._SEEN_WITHIN_S", 0.0)
        patch.setattr("time.sleep", lambda seconds: None)
        return sees_claim(run, claim)


def test_a_run_folder_of_an_earlier_version_resumes_and_its_three_files_become_one(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("7\n")
    (tmp_path / "run.lock").write_text("process 1 on host-a")
    lines = [{"attempt": 6, "images": 0}, {"attempt": 6, "ended": "preempted"}, {"attempt": 7, "images": 0}]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(tmp_path / "run.lock") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"{tmp_path} is in use by another process"):
            run_folder(tmp_path)
    folder = run_folder(tmp_path)
    assert folder.attempt == 8
    assert folder.notes == []
    assert not {"attempts", "run.lock"} & {path.name for path in tmp_path.iterdir()}
    assert "1 attempts in a row began at 0 images" in str(note_start(tmp_path, attempt=8, images=0, limit=1))
    folder.close()
    folder = run_folder(tmp_path)
    assert folder.attempt == 9
    assert folder.claim.run
    folder.close()


@pytest.mark.parametrize(
    "odd", [odd for odd in (*ODD_LINES.values(), *ODD_VALUES.values()) if b'"images": 0}' not in odd]
)
def test_an_odd_line_of_the_metrics_is_set_aside_and_the_sound_ones_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: bytes
) -> None:
    lines = [json.dumps({"images": images, "loss": float("nan")}).encode() for images in (32, 64, 96)]
    whole = b"\n".join([lines[0], odd, *lines[1:]]) + b"\n"
    for content in (whole, b"\n".join([*lines, odd])):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(content)
        for old in tmp_path.glob("metrics.before-*"):
            old.unlink()
        found = tracker(tmp_path, resumed_at=64)
        found.scalars(96, {"loss": 1.0}, clock={})
        found.close()
        kept = [json.loads(line)["images"] for line in path.read_bytes().splitlines()]
        assert kept == [32, 64, 96]
        (aside,) = tmp_path.glob("metrics.before-attempt-0002.jsonl")
        assert lines[2] in aside.read_bytes()
        assert odd in aside.read_bytes()
        if odd or content == whole:
            assert "were set aside" in capsys.readouterr().err


def test_a_log_that_ends_in_half_a_line_gets_the_next_one_on_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "chec')
    found = tracker(tmp_path, resumed_at=0)
    found.event("resume", images=0)
    found.close()
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["event"] == "resume"


def test_nothing_is_rewritten_where_nothing_is_to_be_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images": 32}\n{"images": 64}\n')
    before = path.stat()
    tracker(tmp_path, resumed_at=64).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(tmp_path.glob("metrics.*.jsonl"))


@pytest.mark.parametrize("name", ["outcome.json", "attempts.jsonl", "metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_a_pipe_where_a_file_has_to_be_is_refused_with_its_name(
    tmp_path: Path, name: str, kind: str
) -> None:
    run = tmp_path / "run"
    run_folder(run).close()
    (run / name).unlink(missing_ok=True)
    (os.mkfifo if kind == "pipe" else os.mkdir)(run / name)
    with pytest.raises(UserError, match=rf"{run / name} is no regular file; move it away"):
        run_folder(run)
    (run / name).unlink() if kind == "pipe" else (run / name).rmdir()
    (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is no folder"):
        run_folder(run)


def test_each_way_in_which_a_file_cannot_be_read_is_damage_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.json"
    file.write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    reasons = {"loop": "symbolic links", "pipe": "no regular file", ".": "a folder", "file.json/x": "Not a directory"}
    for name, reason in reasons.items():
        with pytest.raises(Damaged, match=reason):
            records.load(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        records.load(str(tmp_path / "absent"))
    with pytest.raises(Damaged, match="more than it can have"):
        records.load(str(file), limit=1)
    fired = []

    def fails(url: str, start: int | None = None, end: int | None = None) -> bytes:
        fired.append(number)
        raise OSError(number, os.strerror(number), url)

    monkeypatch.setattr(storage, "read", fails)
    for number in (errno.EIO, errno.EACCES, errno.ESTALE):
        with pytest.raises(Damaged, match=os.strerror(number)):
            records.load(str(file))
    for number in (errno.EMFILE, errno.ENOMEM):
        with pytest.raises(TrainingFailed, match=os.strerror(number)):
            records.load(str(file))
    assert len(fired) == 5


def test_a_store_that_does_not_answer_has_damaged_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish("memory://records/file.json", b"{}")
    assert records.load("memory://records/file.json").values == {}
    with pytest.raises(FileNotFoundError):
        records.load("memory://records/absent.json")
    fired = []

    def fails(url: str, start: int | None = None, end: int | None = None) -> bytes:
        fired.append(error)
        raise error

    monkeypatch.setattr(storage, "read", fails)
    errors: list[Exception] = [
        ConnectionError("s3cret"),
        TimeoutError(),
        OSError(errno.EIO, "s3cret"),
        KeyError("s3cret"),
    ]
    for error in errors:  # noqa: B007 - raised by `fails`
        with pytest.raises(TrainingFailed, match="cannot read") as caught:
            records.load("memory://records/file.json")
        assert "s3cret" not in str(caught.value)
    error = PermissionError("s3cret")
    with pytest.raises(UserError, match="refuses access"):
        records.load("memory://records/file.json")
    assert len(fired) == 5


@pytest.mark.parametrize(
    ("take", "bad"),
    [
        ("whole", [-1, 1.0, True, "1", None, [], {}, 2**64, 10**400, float("nan")]),
        ("number", ["1", None, True, float("nan"), float("inf"), 10**400, []]),
        ("text", [1, None, [], "\ud800", "x" * 5000]),
        ("texts", ["x", [1], [None], ["\udc00"], {"a": "b"}]),
        ("wholes", [1, [1.0], [-1], [True], ["1"], [10**400]]),
        ("record", [1, "x", [], None]),
    ],
)
def test_a_value_of_another_type_is_damage_with_its_place(take: str, bad: list[Any]) -> None:
    for value in bad:
        record = Record({"outer": {"key": value}}, place="a.json", remedy="; restore it").record("outer")
        with pytest.raises(Damaged, match=r"^a\.json is damaged: outer\.key is .*; restore it$") as caught:
            getattr(record, take)("key")
        assert len(str(caught.value)) < 300
    with pytest.raises(Damaged, match="outer.key is missing"):
        getattr(Record({"outer": {}}, place="a.json").record("outer"), take)("key")
