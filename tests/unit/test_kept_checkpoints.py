"""Which checkpoints stay, and a checkpoint built by hand from its description, of which every file is looked at."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dist_gan.checkpoint import reader
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection
from dist_gan.types import UserError
from tests.games import Game, game


@pytest.fixture(scope="module")
def played() -> Game:
    found = game("run.batch=2")
    found.step()
    return found


def saved(folder: Path, played: Game, counts: dict[int, dict[str, float]], **section: Any) -> Checkpointer:
    """A folder with a checkpoint of each number of images, and its scalars."""
    found = Checkpointer(str(folder), runtime=played.runtime, section=CheckpointSection(**section), facts={})
    for images, scalars in counts.items():
        save(found, played, images, scalars)
    return found


def save(checkpointer: Checkpointer, played: Game, images: int, scalars: dict[str, float] | None = None) -> None:
    """A checkpoint of the game as it would be after so many images, committed."""
    played.state.progress.images = images
    checkpointer.save(images, played.state.parts(), scalars=scalars)
    checkpointer.drain()


def place(folder: Path, serial: int) -> Path:
    (found,) = folder.glob(f"checkpoint-{serial:04d}-*")
    return found


def images_of(folder: Path) -> list[int]:
    return [
        int(name.rsplit("-", 1)[1])
        for _, name in reader.list_checkpoints(str(folder))
        if (folder / name / "COMMIT").exists()
    ]


FID = {100: 7.0, 200: 3.0, 300: 9.0, 400: 5.0, 500: 6.0, 600: 4.0}


@pytest.mark.parametrize(("best", "expected"), [("metric/fid", 200), ("-metric/fid", 300)])
def test_the_best_is_the_lowest_and_with_a_minus_the_highest(
    best: str, expected: int, tmp_path: Path, played: Game
) -> None:
    counts = {images: {"metric/fid": value} for images, value in FID.items()} | {
        700: {},
        800: {"loss/generator": -50.0},
    }
    saved(tmp_path, played, counts, keep=2, keep_best=best)
    assert images_of(tmp_path) == [expected, 700, 800]


def test_one_stays_for_each_interval_the_first_at_or_after_its_beginning(tmp_path: Path, played: Game) -> None:
    saved(tmp_path, played, {n: {} for n in (90, 180, 270, 360, 500, 590, 610, 900, 990)}, keep=2, keep_every=250)
    assert images_of(tmp_path) == [90, 270, 500, 900, 990]


def test_the_newest_healthy_one_stays_and_older_healthy_ones_do_not(tmp_path: Path, played: Game) -> None:
    found = saved(tmp_path, played, {n: {} for n in (100, 200, 300)}, keep=3)
    for serial in (1, 2):
        found.mark_healthy(str(place(tmp_path, serial)))
    for images in (400, 500, 600):
        save(found, played, images)
    assert images_of(tmp_path) == [200, 400, 500, 600]


def test_abandoned_ones_are_not_counted_among_those_that_are_kept(tmp_path: Path, played: Game) -> None:
    found = saved(tmp_path, played, {n: {} for n in (100, 200, 300, 400)}, keep=4)
    found.mark_healthy(str(place(tmp_path, 4)))
    found.abandon_after(str(place(tmp_path, 2)))
    assert [(place(tmp_path, serial) / "ABANDONED").exists() for serial in (1, 2, 3, 4)] == [False, False, True, True]
    found = Checkpointer(str(tmp_path), runtime=played.runtime, section=CheckpointSection(keep=2), facts={})
    save(found, played, 250)
    assert images_of(tmp_path) == [200, 250]


# -- by hand --------------------------------------------------------------------------------------------------------


def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of two ranks, written from docs/checkpoints.md."""
    folder.mkdir()
    shares = [{"ema/a": torch.arange(5.0), "generator/weights/a": torch.ones(2)}, {"ema/b": torch.arange(3.0)}]
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for rank, share in enumerate(shares):
        name = f"data-{rank:05d}-of-00002.safetensors"
        data = safetensors.torch.save(share)
        (folder / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        head_bytes = int.from_bytes(data[:8], "little")
        for tensor, facts in json.loads(data[8 : 8 + head_bytes]).items():
            offsets = [8 + head_bytes + offset for offset in facts["data_offsets"]]
            tensors[tensor] = {"file": name, "shape": facts["shape"], "dtype": facts["dtype"], "offsets": offsets}
    manifest = {
        "format": "dist_gan.checkpoint",
        "version": 1,
        "serial": int(folder.name.split("-")[1]),
        "images": int(folder.name.split("-")[2]),
        "files": files,
        "tensors": tensors,
        "values": {"part": {"counter": 3}},
    }
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMMIT").write_text(hashlib.sha256(text).hexdigest())
    return shares[0] | shares[1]


def test_a_checkpoint_of_two_files_written_by_hand_is_whole_and_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-0007-000000001234"
    expected = by_hand(folder)
    assert reader.verify(str(folder)) == []
    manifest, tensors = reader.read(str(folder))
    assert manifest["images"] == 1234
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert reader.read(str(folder), prefix="ema/")[1].keys() == {"ema/a", "ema/b"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["flipped bit", "too short", "missing"])
def test_damage_in_any_of_its_files_is_found_named_and_never_read(rank: int, kind: str, tmp_path: Path) -> None:
    older, folder = tmp_path / "checkpoint-0006-000000001000", tmp_path / "checkpoint-0007-000000001234"
    by_hand(older)
    by_hand(folder)
    name = f"data-{rank:05d}-of-00002.safetensors"
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    if kind == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[:-1] if kind == "too short" else data)
    (problem,) = reader.verify(str(folder))
    assert name in problem
    with pytest.raises(UserError, match=name):
        reader.read(str(folder))
    found = reader.newest(str(tmp_path))
    assert found.url == str(older)
    assert len(found.damaged) == 1
    assert name in found.damaged[0]


def test_the_newest_is_the_one_with_the_highest_number_however_long_and_the_next_one_counts_on(
    tmp_path: Path, played: Game
) -> None:
    for serial in (2, 9_999, 10_000):
        by_hand(tmp_path / f"checkpoint-{serial:04d}-000000001234")
    assert [serial for serial, _ in reader.list_checkpoints(str(tmp_path))] == [2, 9_999, 10_000]
    assert reader.newest(str(tmp_path)).url == str(place(tmp_path, 10_000))
    saved(tmp_path, played, {5: {}})
    assert reader.newest(str(tmp_path)).url == str(tmp_path / "checkpoint-10001-000000000005")


@pytest.mark.parametrize("target", [9_998, 9_999, 10_000])
def test_a_rollback_marks_what_is_newer_by_its_number(target: int, tmp_path: Path, played: Game) -> None:
    serials = (2, 9_998, 9_999, 10_000, 10_001)
    for serial in serials:
        by_hand(tmp_path / f"checkpoint-{serial:04d}-000000001234")
    saved(tmp_path, played, {}).abandon_after(str(place(tmp_path, target)))
    marked = [serial for serial in serials if (place(tmp_path, serial) / "ABANDONED").exists()]
    assert marked == [serial for serial in serials if serial > target]


def test_what_was_never_committed_goes_if_it_is_older_and_stays_if_it_may_be_under_way(
    tmp_path: Path, played: Game
) -> None:
    for serial in (9_997, 9_999, 10_005):
        by_hand(tmp_path / f"checkpoint-{serial:04d}-000000001234")
        if serial != 9_999:
            (place(tmp_path, serial) / "COMMIT").unlink()
    found = saved(tmp_path, played, {}, keep=2)
    (tmp_path / "away").mkdir()
    place(tmp_path, 10_005).rename(tmp_path / "away" / "later")
    save(found, played, 10)  # takes the number 10000
    (tmp_path / "away" / "later").rename(tmp_path / "checkpoint-10005-000000001234")
    save(found, played, 20)
    assert [serial for serial, _ in reader.list_checkpoints(str(tmp_path))] == [10_000, 10_001, 10_005]


def test_marks_decide_which_one_is_the_newest(tmp_path: Path) -> None:
    for serial in (1, 2, 3, 4, 5):
        by_hand(tmp_path / f"checkpoint-{serial:04d}-000000001234")
    for serial, mark in ((1, "HEALTHY"), (2, "HEALTHY"), (4, "HEALTHY"), (4, "ABANDONED")):
        (place(tmp_path, serial) / mark).write_bytes(b"")
    (place(tmp_path, 5) / "COMMIT").unlink()
    assert reader.newest(str(tmp_path)).url == str(place(tmp_path, 3))
    assert reader.newest(str(tmp_path), healthy=True).url == str(place(tmp_path, 2))
