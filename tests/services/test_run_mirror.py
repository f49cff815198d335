"""Copies of a run's files beside its checkpoints, and the one launch that may write there."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_gan import attempts, storage
from dist_gan.checkpoint import reader
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection, RuntimeSection
from dist_gan.config.reader import load_config
from dist_gan.run_folder import RunFolder
from dist_gan.run_mirror import owner_of, sees_claim
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.types import TrainingFailed, UserError
from tests.games import SMALL, trained
from tests.services.test_checkpoint import Part


@pytest.fixture
def home() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}/run"
    yield url
    storage.remove_folder(url)


def begun(run: Path, home: str | None, *overrides: str) -> RunFolder:
    """The folder of a run that begins, as rank 0 opens it."""
    place = [] if home is None else [f"checkpoint.url={home}"]
    folder = RunFolder(load_config(None, [*SMALL, f"run.dir={run}", *place, *overrides]))
    folder.take_home()
    return folder


def checkpointer(folder: RunFolder) -> Checkpointer:
    runtime = Runtime(RuntimeSection(threads=1), LaunchSettings())
    return Checkpointer(
        folder.checkpoints, runtime=runtime, section=CheckpointSection(keep=2), facts={}, mirror=folder.mirror
    )


def save(writer: Checkpointer, images: int) -> None:
    writer.save(images, {"part": Part(images)})
    writer.drain()


def test_of_two_launches_the_later_one_owns_the_checkpoints_and_the_earlier_one_writes_nothing_more(
    home: str, tmp_path: Path
) -> None:
    first = begun(tmp_path / "a", home)
    early = checkpointer(first)
    save(early, 10)
    second = begun(tmp_path / "b", home)
    assert (first.attempt, second.attempt) == (1, 2)
    before = storage.list_names(f"{home}/checkpoints")
    with pytest.raises(TrainingFailed, match=r"now belongs to attempt 2 \(process .*; start one launch at a time"):
        save(early, 20)
    for forbidden in (
        lambda: early.mark_healthy(str(reader.newest(f"{home}/checkpoints").url)),
        lambda: early.intend_rollback("checkpoint-0001-000000000010", {}),
        lambda: early.abandon_after(f"{home}/checkpoints/checkpoint-0001-000000000010"),
        early.end_rollback,
    ):
        with pytest.raises(TrainingFailed, match="now belongs to attempt 2"):
            forbidden()
    assert storage.list_names(f"{home}/checkpoints") == before
    save(checkpointer(second), 20)
    assert str(reader.newest(f"{home}/checkpoints").url).endswith("checkpoint-0002-000000000020")
    (tmp_path / "a" / "metrics.jsonl").write_text("{}\n")
    assert first.mirror is not None
    first.mirror.push()
    assert not storage.exists(f"{home}/metrics.jsonl"), "logs of a launch that is no longer the owner stay at home"
    for folder in (first, second):
        folder.close()


def test_a_launch_that_is_overtaken_while_it_writes_commits_nothing(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(tmp_path / "a", home)
    honest, overtaken = storage.publish, []

    def publish(url: str, data: bytes | memoryview) -> None:
        honest(url, data)
        if url.endswith("manifest.json") and not overtaken:
            overtaken.append(begun(tmp_path / "b", home))

    monkeypatch.setattr(storage, "publish", publish)
    with pytest.raises(TrainingFailed, match="now belongs to attempt 2"):
        save(checkpointer(first), 10)
    assert overtaken
    assert reader.newest_commit(f"{home}/checkpoints") is None
    for folder in (first, *overtaken):
        folder.close()


def test_of_two_starts_at_the_same_moment_one_is_refused(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = storage.publish

    def publish(url: str, data: bytes | memoryview) -> None:
        honest(url, data)
        if url == f"{home}/owner.json":  # the other one writes before this one reads
            honest(url, json.dumps(json.loads(bytes(data)) | {"token": "other", "by": "process 1 on h"}).encode())

    monkeypatch.setattr(storage, "publish", publish)
    with pytest.raises(UserError, match="was taken over by process 1 on h while this start began"):
        begun(tmp_path / "a", home)


def test_an_empty_folder_and_an_older_one_are_filled_from_the_store_and_a_newer_one_is_kept(
    home: str, tmp_path: Path
) -> None:
    first = begun(tmp_path / "a", home)
    (tmp_path / "a" / "metrics.jsonl").write_text('{"images": 1}\n')
    (tmp_path / "a" / "secret.txt").write_text("not of the list")
    assert first.mirror is not None
    first.mirror.push()
    first.close()
    second = begun(tmp_path / "b", home)
    assert second.notes == [f"{tmp_path / 'b'}: 3 files of this run were fetched from {home}"]
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == '{"images": 1}\n'
    assert not storage.exists(f"{home}/secret.txt")
    (tmp_path / "b" / "metrics.jsonl").write_text('{"images": 1}\n{"images": 2}\n')
    assert second.mirror is not None
    second.mirror.push()
    second.close()
    third = begun(tmp_path / "a", home)
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == '{"images": 1}\n{"images": 2}\n', "it was older"
    assert [claim.attempt for claim in attempts.read(tmp_path / "a").claims] == [1, 2, 3]
    with pytest.raises(UserError, match="is in use by"):  # the file that was filled is still the locked one
        begun(tmp_path / "a", home)
    (tmp_path / "a" / "metrics.jsonl").write_text("newer\n")
    third.close()
    fourth = begun(tmp_path / "a", home)
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == "newer\n", "this disk had the last attempt"
    assert fourth.notes == []
    fourth.close()


def test_a_folder_of_another_run_is_not_mixed_with_the_one_in_the_store(home: str, tmp_path: Path) -> None:
    begun(tmp_path / "a", home).close()
    begun(tmp_path / "b", None).close()
    with pytest.raises(UserError, match="holds another run than memory://"):
        begun(tmp_path / "b", home)


def test_a_run_that_changes_where_its_checkpoints_are_does_not_begin_anew_in_silence(home: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = begun(run, None)
    folder.close()
    trained(run, "run.images=80", "checkpoint.every=80", "log.samples=1")
    with pytest.raises(
        UserError, match=r"checkpoint.url: the checkpoints of .* start with no checkpoint.url, copy them"
    ):
        begun(run, home, "run.images=80")
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            storage.publish(f"{home}/checkpoints/{file.relative_to(run / 'checkpoints')}", file.read_bytes())
    begun(run, home, "run.images=80").close()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=f"start with checkpoint.url={home}"):
        begun(run, None, "run.images=80")


def test_a_store_that_takes_no_logs_is_reported_once_and_ends_nothing(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, home)
    honest, refused = storage.publish, []

    def publish(url: str, data: bytes | memoryview) -> None:
        if url.startswith(home) and "checkpoint-" not in url:
            refused.append(url)
            raise TrainingFailed(f"cannot write {url}: no")
        honest(url, data)

    monkeypatch.setattr(storage, "publish", publish)
    writer = checkpointer(folder)
    for images in (10, 20):
        (tmp_path / "metrics.jsonl").write_text(f'{{"images": {images}}}\n')
        save(writer, images)
    assert len(refused) == 2
    assert capsys.readouterr().out.count("the logs are not copied to") == 1
    assert str(reader.newest(f"{home}/checkpoints").url).endswith("000000000020")
    folder.close()


def test_a_local_folder_may_keep_the_checkpoints_and_a_rank_that_does_not_see_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_gan.run_mirror._SEEN_WITHIN_S", 0.0)
    folder = begun(tmp_path / "run", str(tmp_path / "kept"))
    assert owner_of(str(tmp_path / "kept")) == folder.claim
    assert sees_claim(tmp_path / "nowhere", folder.claim), "the run's own folder need not be seen"
    assert not sees_claim(tmp_path / "run", folder.claim._replace(home=str(tmp_path / "elsewhere")))
    folder.close()
    same = begun(tmp_path / "run2", str(tmp_path / "run2"))
    assert same.mirror is None, "that is where they are anyway"
    same.close()


def test_an_owner_that_is_no_claim_is_refused_with_what_to_do(home: str, tmp_path: Path) -> None:
    storage.publish(f"{home}/owner.json", b"[]")
    with pytest.raises(UserError, match=r"owner\.json is damaged.*; remove it once no launch trains there"):
        begun(tmp_path, home)


def test_an_http_server_is_refused_for_checkpoints() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.url: 'https://x/run': an HTTP server takes no files"):
        load_config(None, ["checkpoint.url=https://x/run"])
