"""Checkpoints that cannot be read, that somebody wrote by hand, or whose serial has five digits."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_gan import storage
from dist_gan.checkpoint import reader
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection, RecoverySection
from dist_gan.health.recovery import Recovery
from dist_gan.runtime import Runtime
from dist_gan.state import MemoryState, Progress
from dist_gan.types import TrainingFailed, UserError
from tests.services.test_checkpoint import Part, checkpointer, runtime, saved

assert runtime  # the fixture

SECOND = "checkpoint-0002-000000000020"


def in_its_place(kind: str) -> Callable[[Path], None]:
    """Puts something that is no regular file where one was."""

    def put(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "a folder":
            path.mkdir()
        elif kind == "a loop of links":
            path.symlink_to(path)
        else:
            os.mkfifo(path)

    return put


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("manifest.json", "COMMIT", "data") for kind in ("a folder", "a loop of links", "a pipe")]
    + [("", "a loop of links")],
)
def test_a_newest_checkpoint_that_cannot_be_read_is_named_and_the_one_before_it_taken(
    tmp_path: Path, runtime: Runtime, name: str, kind: str
) -> None:
    found = saved(tmp_path, runtime, 10, 20)
    newest = tmp_path / SECOND
    in_its_place(kind)(next(newest.glob("data-*")) if name == "data" else newest / name if name else newest)
    fallback = found.newest()
    assert str(fallback.url).endswith("000000000010")
    assert len(fallback.damaged) == 1
    assert SECOND in fallback.damaged[0]
    assert reader.verify(str(newest))
    with pytest.raises(UserError, match=SECOND):
        found.load(str(newest), {"part": Part()})
    found.save(30, {"part": Part(3)})
    found.drain()
    assert str(found.newest().url).endswith("000000000030"), "the run goes on"


@pytest.mark.parametrize("place", ["manifest.json", "COMMIT", "safetensors", "folder"])
def test_a_disk_that_gives_eio_damages_one_checkpoint_and_a_store_that_is_silent_none(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    fired: list[str] = []

    def break_off(name: str, error: Exception) -> None:
        honest = getattr(storage, name)

        def fails(url: str, *arguments: Any) -> Any:
            if SECOND in url and (url.endswith(place) or name == "list_names"):
                fired.append(url)
                raise error
            return honest(url, *arguments)

        monkeypatch.setattr(storage, name, fails)

    function = "list_names" if place == "folder" else "read"
    found = saved(tmp_path, runtime, 10, 20)
    break_off(function, OSError(errno.EIO, "Input/output error"))
    fallback = found.newest()
    assert fired
    assert str(fallback.url).endswith("000000000010")
    assert SECOND in fallback.damaged[0]
    assert "Input/output error" in fallback.damaged[0]
    monkeypatch.undo()

    folder = f"memory://silent-{place}"
    found = saved(folder, runtime, 10, 20)
    fired.clear()
    break_off(function, ConnectionError("no answer"))
    with pytest.raises(TrainingFailed, match="cannot read"):
        found.newest()
    if place != "folder":
        with pytest.raises(TrainingFailed, match="cannot read"):
            found.load(f"{folder}/{SECOND}", {"part": Part()})
    assert fired
    monkeypatch.undo()
    storage.remove_folder(folder)


RECOVERY = Recovery(RecoverySection()).values()
PROGRESS = Progress(images=20).values()
STREAM = {"draw": 3, "fingerprint": "abc", "damaged": []}
EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "images below zero": lambda m: m["values"]["progress"].update(images=-500),
    "images that are not those of the manifest": lambda m: m["values"]["progress"].update(images=21),
    "images as text": lambda m: m["values"]["progress"].update(images="20"),
    "a counter that is true": lambda m: m["values"]["progress"].update(d_updates=True),
    "averaged beyond the images": lambda m: m["values"]["progress"].update(averaged_images=21),
    "seconds that are NaN": lambda m: m["values"]["progress"].update(seconds=float("nan")),
    "a counter that is missing": lambda m: m["values"]["progress"].pop("g_updates"),
    "progress as a list": lambda m: m["values"].update(progress=[]),
    "rollbacks below zero": lambda m: m["values"]["recovery"].update(rollbacks=-5),
    "recovery without a player": lambda m: m["values"]["recovery"]["skipped"].pop("generator"),
    "recovery of other types": lambda m: m["values"]["recovery"].update(recent=7),
    "a window of text": lambda m: m["values"]["recovery"]["recent"].update(generator=["x"]),
    "a draw below zero": lambda m: m["values"]["stream"].update(draw=-1),
    "a draw beyond all": lambda m: m["values"]["stream"].update(draw=2**62),
    "a draw with a fraction": lambda m: m["values"]["stream"].update(draw=3.5),
    "no fingerprint": lambda m: m["values"]["stream"].update(fingerprint=None),
    "damage that is no pair": lambda m: m["values"]["stream"].update(damaged=[["a"]]),
    "damage that is a number": lambda m: m["values"]["stream"].update(damaged=4),
    "values as a number": lambda m: m.update(values=1),
    "a part as null": lambda m: m["values"].update(part=None),
    "a serial of zero": lambda m: m.update(serial=0),
    "images as null": lambda m: m.update(images=None),
    "files as a list": lambda m: m.update(files=["x"]),
    "a file of negative size": lambda m: next(iter(m["files"].values())).update(bytes=-1),
    "a file without a hash": lambda m: next(iter(m["files"].values())).pop("sha256"),
    "a hash that is a number": lambda m: next(iter(m["files"].values())).update(sha256=1),
    "tensors as text": lambda m: m.update(tensors="x"),
    "a tensor in another file": lambda m: next(iter(m["tensors"].values())).update(file="data-00009-of-00010.safetensors"),
    "a tensor in a list": lambda m: next(iter(m["tensors"].values())).update(file=["x"]),
    "a shape below zero": lambda m: next(iter(m["tensors"].values())).update(shape=[-1, 5]),
    "a shape beyond all": lambda m: next(iter(m["tensors"].values())).update(shape=[2**40, 2**40]),
    "a shape of 5,000 axes": lambda m: next(iter(m["tensors"].values())).update(shape=[1] * 5000),
    "another dtype": lambda m: next(iter(m["tensors"].values())).update(dtype="I8"),
    "no dtype": lambda m: next(iter(m["tensors"].values())).update(dtype=["F32"]),
    "offsets swapped": lambda m: next(iter(m["tensors"].values()))["offsets"].reverse(),
    "another shape of as many numbers": lambda m: m["tensors"]["part/weights/a"].update(shape=[5, 7]),
    "a tensor left out": lambda m: m["tensors"].pop("part/weights/a"),
    "a tensor too many": lambda m: m["tensors"].update({"part/weights/x": m["tensors"]["part/weights/a"]}),
    "settings as a list": lambda m: m.update(config=["x"]),
    "scalars as text": lambda m: m.update(scalars={"metric/fid": "low"}),
    "classes as a number": lambda m: m.update(classes=3),
    "a format that is a list": lambda m: m.update(format=[1]),
    "another version": lambda m: m.update(version=2),
    "a version that is true": lambda m: m.update(version="1"),
}  # fmt: skip


class Fixed(Part):
    """A part with given JSON values."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.held, self.kept = {}, values

    def values(self) -> dict[str, Any]:
        return self.kept


def rewrite(folder: Path, content: bytes) -> None:
    """Another manifest, with a COMMIT that fits."""
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMIT").write_text(hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    """Two checkpoints of a part of every kind and of the parts that a run has."""
    folder = tmp_path_factory.mktemp("pair")
    found = checkpointer(folder, runtime)
    for images in (10, 20):
        parts = {"progress": Fixed(PROGRESS | {"images": images}), "recovery": Fixed(RECOVERY), "stream": Fixed(STREAM)}
        found.save(images, {"part": Part(images), **parts}, scalars={"metric/fid": float("nan")})
        found.drain()
    assert str(found.newest().url).endswith(SECOND), "a scalar that is not finite is what the log showed"
    return folder


@pytest.mark.parametrize("edit", list(EDITS))
def test_a_manifest_of_other_types_is_damaged_though_its_hash_fits(
    pair: Path, tmp_path: Path, runtime: Runtime, edit: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    manifest = json.loads((folder / SECOND / "manifest.json").read_text())
    EDITS[edit](manifest)
    rewrite(folder / SECOND, json.dumps(manifest).encode())
    fallback = checkpointer(folder, runtime).newest()
    assert str(fallback.url).endswith("000000000010")
    assert len(fallback.damaged) == 1
    assert SECOND in fallback.damaged[0]
    assert len(fallback.damaged[0]) < 700
    with pytest.raises(UserError, match=SECOND):
        checkpointer(folder, runtime).load(str(folder / SECOND), {"part": Part()})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b"1", b"\xff\xfe", b"[" * 300_000, b'{"serial": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 1}',
        b"{" + b'"x": {' * 100_000,
    ],
    ids=["empty", "a list", "null", "a number", "no UTF-8", "nested", "5,000 digits", "a name twice", "nested objects"],
)  # fmt: skip
def test_a_manifest_that_is_no_object_is_damaged_though_its_hash_fits(
    pair: Path, tmp_path: Path, runtime: Runtime, content: bytes
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    rewrite(folder / SECOND, content)
    (text,) = checkpointer(folder, runtime).newest().damaged
    assert f"{SECOND}/manifest.json is damaged" in text


def test_a_checkpoint_under_the_name_of_another_is_damaged_and_under_a_name_of_its_own_it_is_not(
    pair: Path, tmp_path: Path, runtime: Runtime
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    shutil.copytree(folder / SECOND, folder / "checkpoint-100000-000000100000")
    found = checkpointer(folder, runtime).newest()
    assert str(found.url).endswith(SECOND)
    assert "its manifest is that of serial 2 at 20 images" in found.damaged[0]
    shutil.copytree(folder / SECOND, tmp_path / "best")
    assert reader.verify(str(tmp_path / "best")) == []


def at_serial(folder: Path, runtime: Runtime, first: int, count: int, **section: Any) -> Checkpointer:
    """Checkpoints from a serial on, which after so many a run would have."""
    found = checkpointer(folder, runtime, **section)
    found._serial = first - 1
    for number in range(count):
        found.save(10 * (number + 1), {"part": Part(number)})
        found.drain()
    return found


def serials(folder: Path, mark: str) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in folder.glob(f"*/{mark}"))


@pytest.mark.parametrize(
    ("target", "expected"), [(9998, [9999, 10000, 10001]), (9999, [10000, 10001]), (10000, [10001])]
)
def test_a_rollback_marks_what_is_newer_by_serial_from_ten_thousand_on(
    tmp_path: Path, runtime: Runtime, target: int, expected: list[int]
) -> None:
    found = at_serial(tmp_path, runtime, 9998, 4, keep=9)
    (url,) = tmp_path.glob(f"checkpoint-{target}-*")
    found.abandon_after(str(url))
    assert serials(tmp_path, "ABANDONED") == expected
    assert found.newest().url == str(url)
    assert found.newest(before=9999).url == str(next(tmp_path.glob("checkpoint-9998-*")))


def test_retention_goes_by_serial_from_ten_thousand_on(tmp_path: Path, runtime: Runtime) -> None:
    for name in ("checkpoint-9997-000000000005", "checkpoint-10003-000000000099"):
        (tmp_path / name).mkdir()
    at_serial(tmp_path, runtime, 9998, 4, keep=2)
    left = [serial for serial, _ in reader.list_checkpoints(str(tmp_path))]
    assert left == [10000, 10001, 10003], (
        "the half one is cleared away once a newer one is whole, and none that is newer"
    )
    assert serials(tmp_path, "COMMIT") == [10000, 10001]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 300_000, b"{}", b'{"target": 7}', b'{"target": "../../checkpoint-1"}',
        b'{"target": "../checkpoint-0001-000000000010/x"}',
        b'{"target": "checkpoint-0001-000000000010", "recovery": {"rollbacks": -1}}',
        b'{"target": "checkpoint-0001-000000000010", "recovery": []}',
        b'{"target": "checkpoint-0001-000000000010", "seconds": NaN}',
        b'{"target": "checkpoint-0001-000000000010", "stream": {"draw": "4"}}',
        b'{"target": "checkpoint-0001-000000000010", "target": "checkpoint-0002-000000000020"}',
    ],
)  # fmt: skip
def test_a_damaged_note_of_a_rollback_is_one_sentence_with_what_to_do(
    tmp_path: Path, runtime: Runtime, content: bytes
) -> None:
    (tmp_path / "rollback.json").write_bytes(content)
    with pytest.raises(UserError, match=r"rollback\.json.*; a rollback was under way: restore the file, or delete it"):
        checkpointer(tmp_path, runtime).intended_rollback()


def test_the_newest_commit_is_told_without_reading_a_file(tmp_path: Path, runtime: Runtime) -> None:
    assert reader.newest_commit(str(tmp_path / "nowhere")) is None
    found = saved(tmp_path, runtime, 10, 20, 30)
    for file in tmp_path.rglob("data-*"):
        file.write_bytes(b"")
    assert reader.newest_commit(str(tmp_path)) == reader.Commit(str(tmp_path / "checkpoint-0003-000000000030"), 30)
    (tmp_path / "checkpoint-0003-000000000030" / "COMMIT").unlink()
    found.abandon_after(str(tmp_path / "checkpoint-0001-000000000010"))
    assert reader.newest_commit(str(tmp_path)) == reader.Commit(str(tmp_path / "checkpoint-0001-000000000010"), 10)


def test_logs_are_on_the_disk_when_a_checkpoint_is_committed(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = [tmp_path / "metrics.jsonl", tmp_path / "events.jsonl", tmp_path / "absent.jsonl"]
    for log in logs[:2]:
        log.write_text("{}\n")
    story: list[str] = []
    honest_sync, honest_publish = os.fsync, storage.publish

    def sync(handle: int) -> None:
        story.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        honest_sync(handle)

    def publish(url: str, data: bytes | memoryview) -> None:
        story.append(f"begins {url.rsplit('/', 1)[-1]}")
        honest_publish(url, data)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(storage, "publish", publish)
    found = Checkpointer(str(tmp_path / "c"), runtime=runtime, section=CheckpointSection(), facts={}, logs=logs)
    found.save(10, {"part": Part()})
    found.drain()
    committed = story.index("begins COMMIT")
    assert {"metrics.jsonl", "events.jsonl"} <= set(story[:committed])


def test_a_memory_of_another_objective_is_refused_and_nothing_is_broadcast() -> None:
    memory = {"real": torch.zeros(3), "fake": torch.zeros(3)}
    for tensors in ({}, {"real": torch.ones(3)}, {"real": torch.ones(1), "fake": torch.ones(3)}):
        with pytest.raises(ValueError, match="the objective's memory"):
            MemoryState(memory).load_tensors(tensors)
    assert not memory["real"].any()
