"""Which checkpoints stay, against the rule in plain words; and what a store must have taken before one counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dist_gan import storage
from dist_gan.checkpoint import reader
from dist_gan.runtime import Runtime
from dist_gan.types import TrainingFailed
from tests.services.own_store import Store, own_clock, own_store
from tests.services.test_checkpoint import Part, checkpointer, runtime

__all__ = ["runtime"]

HISTORY = [(20, 5.0), (90, 1.0), (110, 9.0), (140, 4.0), (190, 8.0), (215, 6.0), (290, 2.0), (310, 7.0), (330, 3.0)]
"""Images and metric/fid of checkpoints, oldest first."""


def kept(folder: Path | str) -> list[int]:
    return [int(name.rsplit("-", 1)[-1]) for _, name in reader.list_checkpoints(str(folder))]


def written(folder: Path, runtime: Runtime) -> dict[int, str]:
    """The whole history, nothing of it deleted yet; URL by images."""
    found, urls = checkpointer(folder, runtime, keep=100), {}
    for images, fid in HISTORY:
        urls[images] = found.save(images, {"part": Part(images)}, scalars={"metric/fid": fid, "metric/is": fid})
        found.drain()
    return urls


def mark(url: str, name: str) -> None:
    storage.publish(storage.join(url, name), b"")


def after_one_more(folder: Path, runtime: Runtime, **section: object) -> list[int]:
    """What is left when number 400 has been committed under a rule."""
    found = checkpointer(folder, runtime, **section)
    found.save(400, {"part": Part(4)}, scalars={"metric/fid": 5.5, "metric/is": 5.5})
    found.drain()
    return kept(folder)


@pytest.mark.parametrize(
    ("section", "stay"),
    [
        ({"keep": 2}, {330}),
        ({"keep": 4}, {290, 310, 330}),
        ({"keep": 2, "keep_every": 100}, {20, 110, 215, 310, 330}),
        ({"keep": 2, "keep_every": 300}, {20, 310, 330}),
        ({"keep": 2, "keep_best": "metric/fid"}, {90, 330}),
        ({"keep": 2, "keep_best": "-metric/is"}, {110, 330}),
        ({"keep": 3, "keep_every": 200, "keep_best": "metric/fid"}, {20, 90, 215, 310, 330}),
    ],
)
def test_what_stays_is_the_newest_the_milestones_and_the_best(
    section: dict[str, object], stay: set[int], tmp_path: Path, runtime: Runtime
) -> None:
    """A milestone is the first one of each `keep_every` images; number 400 itself always stays."""
    written(tmp_path, runtime)
    assert kept(tmp_path) == [images for images, _ in HISTORY]
    assert set(after_one_more(tmp_path, runtime, **section)) == stay | {400}


def test_the_newest_healthy_one_stays_and_no_older_one(tmp_path: Path, runtime: Runtime) -> None:
    urls = written(tmp_path, runtime)
    for images in (20, 140, 190):
        mark(urls[images], reader.HEALTHY)
    assert after_one_more(tmp_path, runtime, keep=2) == [190, 330, 400]


def test_abandoned_ones_take_nobodys_place(tmp_path: Path, runtime: Runtime) -> None:
    """Neither among the newest, nor as healthy, as a milestone or as the best."""
    urls = written(tmp_path, runtime)
    mark(urls[190], reader.HEALTHY)
    for images in (90, 290, 310, 330):
        mark(urls[images], reader.ABANDONED)
    mark(urls[310], reader.HEALTHY)
    left = after_one_more(tmp_path, runtime, keep=3, keep_every=300, keep_best="metric/fid")
    whole = [i for i in left if i not in (90, 290, 310, 330)]
    assert whole == [20, 140, 190, 215, 400], (
        "20 is a milestone, 140 the best, 190 healthy, 190, 215 and 400 the newest"
    )


def test_what_is_not_committed_counts_for_nothing(tmp_path: Path, runtime: Runtime) -> None:
    urls = written(tmp_path, runtime)
    storage.remove(storage.join(urls[330], reader.COMMIT))
    storage.remove(storage.join(urls[310], reader.COMMIT))
    assert after_one_more(tmp_path, runtime, keep=2) == [290, 400]


# -- in a store ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[Store]:
    with own_store() as found:
        yield found


def test_in_a_store_the_commit_is_written_last_and_removed_first(store: Store, runtime: Runtime) -> None:
    found = checkpointer("gs://b/run", runtime, keep=2)
    for images in (10, 20, 30):
        store.asked.clear()
        found.save(images, {"part": Part(images)})
        found.drain()
        names = [path.rsplit("/", 1)[-1] for what, path, *_ in store.asked if what == "write"]
        assert names == ["data-00000-of-00001.safetensors", "manifest.json", "COMMIT"]
    removed = [path for what, path, *_ in store.asked if what == "remove"]
    assert removed[0] == "b/run/checkpoint-0001-000000000010/COMMIT"
    assert all(path.startswith("b/run/checkpoint-0001-000000000010/") for path in removed)
    assert kept("gs://b/run") == [20, 30]


@pytest.mark.parametrize("file", ["safetensors", "manifest.json", "COMMIT"])
def test_a_file_that_arrives_short_fails_the_save_and_the_one_before_it_stays(
    store: Store, runtime: Runtime, file: str
) -> None:
    found = checkpointer("gs://b/run", runtime, keep=2)
    for images in (10, 20):
        found.save(images, {"part": Part(images)})
        found.drain()
    store.on_write = lambda path, data: data[:-1] if path.endswith(file) else data
    found.save(30, {"part": Part(30)})
    with pytest.raises(TrainingFailed, match=r"\d+ of \d+ bytes arrived"):
        found.drain()
    store.on_write = lambda path, data: data
    newest = found.newest()
    assert str(newest.url).endswith("000000000020")
    assert newest.damaged == (), "what was not committed is no damage"
    other = Part()
    found.load(str(newest.url), {"part": other})
    assert other.counter == 20


def test_what_a_store_gave_back_changed_is_damage_and_nothing_is_deleted_for_it(store: Store, runtime: Runtime) -> None:
    """The new one is read back whole, and only then an old one goes."""
    found = checkpointer("gs://b/run", runtime, keep=2)
    for images in (10, 20):
        found.save(images, {"part": Part(images)})
        found.drain()

    def rotten(path: str, data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if path.endswith("safetensors") else data

    store.on_write = rotten
    found.save(30, {"part": Part(30)})
    found.drain()
    assert kept("gs://b/run") == [10, 20, 30]
    newest = found.newest()
    assert str(newest.url).endswith("000000000020")
    (problem,) = newest.damaged
    assert "its bytes do not have the hash in the manifest" in problem


def test_every_file_of_a_checkpoint_is_verified_and_not_only_the_first(tmp_path: Path, runtime: Runtime) -> None:
    """Its tensors are dealt to three files, as three ranks would have written them, of which one at a time is damaged."""
    found = checkpointer(tmp_path, runtime)
    url = found.save(10, {"part": Part(10)})
    found.drain()
    folder = Path(url)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    tensors = safetensors.torch.load((folder / "data-00000-of-00001.safetensors").read_bytes())
    manifest["files"], manifest["world_size"] = {}, 3
    whole = {}
    for rank in range(3):
        name = f"data-{rank:05d}-of-00003.safetensors"
        mine = {key: tensors[key] for key in sorted(tensors)[rank::3]}
        whole[name] = data = safetensors.torch.save(mine)
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        begin = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:begin]).items():
            offsets = [begin + offset for offset in entry["data_offsets"]]
            manifest["tensors"][key] = {
                "file": name,
                "shape": entry["shape"],
                "dtype": entry["dtype"],
                "offsets": offsets,
            }
        (folder / name).write_bytes(data)
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / reader.COMMIT).write_text(hashlib.sha256(text).hexdigest())
    assert reader.verify(url) == []
    assert found.newest().url == url
    other = Part()
    found.load(url, {"part": other})
    assert all(torch.equal(tensor, Part(10).held[key]) for key, tensor in other.held.items())
    for name, data in whole.items():
        for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), data + b"\0"):
            (folder / name).write_bytes(damaged)
            (problem,) = reader.verify(url)
            assert name in problem
        (folder / name).write_bytes(data)
    (folder / "data-00001-of-00003.safetensors").unlink()
    assert len(reader.verify(url)) == 1


def test_a_store_that_is_silent_for_a_while_delays_a_save(store: Store, runtime: Runtime) -> None:
    failures: list[Exception] = [ConnectionResetError(), TimeoutError()]

    def fail(path: str, data: bytes) -> bytes:
        if failures:
            raise failures.pop()
        return data

    store.on_write = fail
    found = checkpointer("gs://b/run", runtime)
    with own_clock() as clock:
        found.save(10, {"part": Part(10)})
        found.drain()
    assert len(clock.waits) >= 2
    assert failures == []
    assert reader.verify(str(found.newest().url)) == []
