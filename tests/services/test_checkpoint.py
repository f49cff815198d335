"""Checkpoints: readable by others, exact at the boundary, whole or absent, and honest about every kind of damage."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dist_gan import storage
from dist_gan.checkpoint import reader
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection, RuntimeSection
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.types import TensorFacts, TrainingFailed, UserError, facts_of


class Part:
    """A part of a run with tensors of every kind and one JSON value."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.held = {
            "weights/a": torch.randn(7, 5, generator=g),
            "weights/b": torch.randn(3, generator=g, dtype=torch.float64),
            "buffers/count": torch.tensor(seed),
            "buffers/half": torch.randn(9, generator=g).to(torch.bfloat16),
            "buffers/flags": torch.rand(5, generator=g) > 0.5,
        }
        self.counter = seed

    def table(self) -> dict[str, TensorFacts]:
        return {name: facts_of(tensor) for name, tensor in self.held.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.held.items())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors.keys() != self.held.keys():
            raise ValueError("other names")
        for name, tensor in tensors.items():
            self.held[name].copy_(tensor)

    def values(self) -> dict[str, Any]:
        return {"counter": self.counter}

    def load_values(self, values: dict[str, Any]) -> None:
        self.counter = values["counter"]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(RuntimeSection(threads=1), LaunchSettings())


def checkpointer(folder: Path | str, runtime: Runtime, **section: Any) -> Checkpointer:
    return Checkpointer(str(folder), runtime=runtime, section=CheckpointSection(**section), facts={"config": "c: 1"})


def saved(folder: Path | str, runtime: Runtime, *counts: int, **section: Any) -> Checkpointer:
    """A folder with a checkpoint of each count of images."""
    found = checkpointer(folder, runtime, **section)
    for count in counts:
        found.save(count, {"part": Part(count)}, scalars={"metric/fid": float(100 - count % 7)})
        found.drain()
    return found


def test_a_checkpoint_can_be_read_with_nothing_but_safetensors_and_json(tmp_path: Path, runtime: Runtime) -> None:
    saved(tmp_path, runtime, 64)
    (folder,) = tmp_path.iterdir()
    raw = (folder / "manifest.json").read_bytes()
    assert (folder / "COMMIT").read_text() == hashlib.sha256(raw).hexdigest()
    manifest = json.loads(raw)
    assert (manifest["format"], manifest["version"], manifest["serial"], manifest["images"]) == (
        "dist_gan.checkpoint", 1, 1, 64,
    )  # fmt: skip
    assert manifest["values"] == {"part": {"counter": 64}}
    expected = {f"part/{name}": tensor for name, tensor in Part(64).held.items()}
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert len(data) == facts["bytes"]
        assert hashlib.sha256(data).hexdigest() == facts["sha256"]
        for key, tensor in safetensors.torch.load(data).items():
            assert torch.equal(tensor, expected[key])
            entry = manifest["tensors"][key]
            assert entry["file"] == name
            start, end = entry["offsets"]
            place = torch.frombuffer(bytearray(data[start:end]), dtype=tensor.dtype).view(entry["shape"])
            assert torch.equal(place, tensor), "the offsets are those in the file"
    assert manifest["tensors"].keys() == expected.keys()


def test_what_is_saved_is_the_boundary_even_if_everything_moves_on_at_once(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, found = Part(3), checkpointer(tmp_path, runtime)
    import threading

    may_write = threading.Event()
    honest = storage.publish
    monkeypatch.setattr(storage, "publish", lambda url, data: (may_write.wait(10), honest(url, data))[1])
    found.save(10, {"part": part})
    for tensor in part.held.values():
        tensor.zero_()
    part.counter = -1
    may_write.set()
    found.drain()
    other = Part(9)
    found.load(str(found.newest().url), {"part": other})
    assert other.counter == 3
    assert all(torch.equal(tensor, Part(3).held[name]) for name, tensor in other.held.items())


def test_serials_never_go_back(tmp_path: Path, runtime: Runtime) -> None:
    saved(tmp_path, runtime, 10, 20, 30, keep=2)
    assert [s for s, _ in reader.list_checkpoints(str(tmp_path))] == [2, 3]
    saved(tmp_path, runtime, 15, keep=2)
    assert [name for _, name in reader.list_checkpoints(str(tmp_path))] == [
        "checkpoint-0003-000000000030",
        "checkpoint-0004-000000000015",
    ]
    assert str(checkpointer(tmp_path, runtime).newest().url).endswith("checkpoint-0004-000000000015")


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def _edit_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"counter": 20', '"counter": 99'))


def _one_file(folder: Path) -> Path:
    return next(folder.glob("data-*"))


class _Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/dist-gan-was-here",)


DAMAGES = {
    "a flipped bit": (lambda f: _flip(_one_file(f)), "its bytes do not have the hash"),
    "a truncated file": (lambda f: os.truncate(_one_file(f), 100), "100 bytes instead of"),
    "a missing file": (lambda f: _one_file(f).unlink(), "is missing"),
    "an edited manifest": (_edit_manifest, "COMMIT is not the hash of manifest.json"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "is missing"),
    "a pickle for a file": (lambda f: _one_file(f).write_bytes(pickle.dumps(_Hostile())), "bytes instead of"),
    "a pickle for the manifest": (
        lambda f: (f / "manifest.json").write_bytes(pickle.dumps(_Hostile())),
        "COMMIT is not",
    ),
    "a pickle for COMMIT": (lambda f: (f / "COMMIT").write_bytes(pickle.dumps(_Hostile())), "COMMIT is not the hash"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, runtime: Runtime, damage: str
) -> None:
    marker = Path("/tmp/dist-gan-was-here")
    marker.unlink(missing_ok=True)
    found = saved(tmp_path, runtime, 10, 20)
    newest = tmp_path / "checkpoint-0002-000000000020"
    spoil, text = DAMAGES[damage]
    spoil(newest)
    assert any(text in problem for problem in reader.verify(str(newest)))
    fallback = found.newest()
    assert str(fallback.url).endswith("checkpoint-0001-000000000010")
    assert len(fallback.damaged) == 1
    assert text in fallback.damaged[0]
    assert "checkpoint-0002" in fallback.damaged[0]
    with pytest.raises(UserError, match="checkpoint-0002"):
        found.load(str(newest), {"part": Part()})
    assert not marker.exists(), "nothing was unpickled"


def test_a_hostile_pickle_with_a_fitting_hash_is_still_not_run(tmp_path: Path, runtime: Runtime) -> None:
    marker = Path("/tmp/dist-gan-was-here")
    marker.unlink(missing_ok=True)
    found = saved(tmp_path, runtime, 10)
    (folder,) = tmp_path.iterdir()
    file, data = _one_file(folder), pickle.dumps(_Hostile())
    file.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    raw = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(raw)
    (folder / "COMMIT").write_text(hashlib.sha256(raw).hexdigest())
    with pytest.raises(UserError, match="is no safetensors file"):
        found.load(str(folder), {"part": Part()})
    assert reader.verify(str(folder))
    assert not marker.exists()


def test_all_damaged_is_an_error_and_no_silent_new_start(tmp_path: Path, runtime: Runtime) -> None:
    found = saved(tmp_path, runtime, 10, 20)
    for folder in tmp_path.iterdir():
        _flip(_one_file(folder))
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        found.newest()


def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, runtime: Runtime) -> None:
    saved(tmp_path, runtime, 10)
    (folder,) = tmp_path.iterdir()
    raw = (folder / "manifest.json").read_text().replace(_one_file(folder).name, "../../secret")
    (folder / "manifest.json").write_text(raw)
    (folder / "COMMIT").write_text(hashlib.sha256(raw.encode()).hexdigest())
    with pytest.raises(UserError, match="names a file"):
        reader.read_manifest(str(folder))


@pytest.mark.parametrize("which", ["safetensors", "manifest.json", "COMMIT"])
def test_a_full_disk_fails_the_save_at_the_next_boundary_and_leaves_nothing_that_looks_whole(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    found = saved(tmp_path, runtime, 10)
    honest = storage.local.publish

    def full(path: Path, data: bytes | memoryview) -> None:
        if path.name.endswith(which):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        honest(path, data)

    monkeypatch.setattr(storage.local, "publish", full)
    found.save(20, {"part": Part(2)})
    with pytest.raises(TrainingFailed, match=r"the disk is full"):
        found.drain()
    assert found.finished()[-1].images == 10
    assert str(found.newest().url).endswith("000000000010")
    monkeypatch.setattr(storage.local, "publish", honest)
    found.save(30, {"part": Part(3)})
    found.drain()
    assert str(found.newest().url).endswith("000000000030")
    assert [i for _, n in reader.list_checkpoints(str(tmp_path)) if (i := int(n[-12:])) == 20] == [], (
        "retention cleared it away"
    )


def test_a_disk_that_becomes_read_only_fails_the_save_and_keeps_what_is_there(
    tiny_disk: Path, runtime: Runtime
) -> None:
    found = saved(tiny_disk / "run", runtime, 10, 20, keep=2)
    before = {path: path.read_bytes() for path in (tiny_disk / "run").rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    found.save(30, {"part": Part(3)})
    with pytest.raises(TrainingFailed, match=r"no write permission; choose a folder you may write to"):
        found.drain()
    assert {path: path.read_bytes() for path in (tiny_disk / "run").rglob("*") if path.is_file()} == before
    assert str(found.newest().url).endswith("000000000020")
    subprocess.run(["mount", "-o", "remount,rw", str(tiny_disk)], check=True)
    found.save(40, {"part": Part(4)})
    found.drain()
    assert [int(n[-12:]) for _, n in reader.list_checkpoints(str(tiny_disk / "run"))] == [20, 40]


def test_deletes_that_fail_are_no_failure_and_tried_again(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = storage.remove_folder

    def refuse(url: str) -> None:
        raise OSError(errno.EACCES, "Permission denied", url)

    monkeypatch.setattr(storage, "remove_folder", refuse)
    found = saved(tmp_path, runtime, 10, 20, 30, 40, keep=2)
    assert [int(n[-12:]) for _, n in reader.list_checkpoints(str(tmp_path))] == [10, 20, 30, 40]
    assert not (tmp_path / "checkpoint-0001-000000000010" / "COMMIT").exists(), "COMMIT goes first"
    monkeypatch.setattr(storage, "remove_folder", honest)
    found.save(50, {"part": Part(5)})
    found.drain()
    assert [int(n[-12:]) for _, n in reader.list_checkpoints(str(tmp_path))] == [40, 50]


def test_retention_keeps_the_last_the_milestones_the_best_and_the_newest_healthy(
    tmp_path: Path, runtime: Runtime
) -> None:
    found = checkpointer(tmp_path, runtime, keep=2, keep_every=100, keep_best="metric/fid")
    scores = {10: 9.0, 60: 1.0, 110: 7.0, 160: 6.0, 210: 5.0, 260: 4.0, 290: 8.0, 295: 8.5}
    for images, fid in scores.items():
        url = found.save(images, {"part": Part(images)}, scalars={"metric/fid": fid})
        found.drain()
        if images == 160:
            found.mark_healthy(url)
    assert [int(n[-12:]) for _, n in reader.list_checkpoints(str(tmp_path))] == [10, 60, 110, 160, 210, 290, 295]


def test_nothing_is_deleted_before_the_new_one_is_whole(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = saved(tmp_path, runtime, 10, 20, keep=2)
    honest = storage.local.publish

    def rotten(path: Path, data: bytes | memoryview) -> None:
        honest(path, bytes(data)[:-1] + b"?" if path.name.endswith("safetensors") else data)

    monkeypatch.setattr(storage.local, "publish", rotten)
    found.save(30, {"part": Part(3)})
    found.drain()
    assert [int(n[-12:]) for _, n in reader.list_checkpoints(str(tmp_path))] == [10, 20, 30]
    assert str(found.newest().url).endswith("000000000020")


def test_a_stores_memory_holds_checkpoints_too(runtime: Runtime) -> None:
    folder = "memory://checkpoints-of-a-test"
    found = saved(folder, runtime, 10, 20, 30, keep=2)
    other = Part()
    found.load(str(found.newest().url), {"part": other})
    assert other.counter == 30
    assert len(reader.list_checkpoints(folder)) == 2
    storage.remove_folder(folder)


def test_a_checkpoint_of_other_parts_or_networks_is_refused(tmp_path: Path, runtime: Runtime) -> None:
    found = saved(tmp_path, runtime, 10)
    with pytest.raises(UserError, match="does not hold other"):
        found.load(str(found.newest().url), {"other": Part()})
    strange = Part()
    strange.held["weights/c"] = torch.zeros(1)
    with pytest.raises(UserError, match="does not fit this run: other names"):
        found.load(str(found.newest().url), {"part": strange})


def test_abandoned_ones_are_passed_over_without_a_word(tmp_path: Path, runtime: Runtime) -> None:
    found = saved(tmp_path, runtime, 10, 20, 30)
    target = str(tmp_path / "checkpoint-0001-000000000010")
    found.mark_healthy(target)
    assert str(found.newest(healthy=True).url) == target
    found.intend_rollback(target, {"recovery": {"rollbacks": 1}})
    found.abandon_after(target)
    assert found.newest() == reader.SearchResult(target, ())
    assert found.intended_rollback() == {"target": "checkpoint-0001-000000000010", "recovery": {"rollbacks": 1}}
    found.save(15, {"part": Part(15)})
    found.drain()
    found.end_rollback()
    assert found.intended_rollback() is None
    assert str(found.newest().url).endswith("checkpoint-0004-000000000015")
    shutil.rmtree(tmp_path / "checkpoint-0001-000000000010")
