"""Batches against shards written by hand: which image, which label, which way round, from a tar in nobody's order.

What a batch must hold is computed here from the numbers of the pictures and the order of test_order_reference; nothing is
compared with another run of the same program.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_gan.config import ShardsData
from dist_gan.data.decoding import Damage, Sample
from dist_gan.data.manifest import Manifest, read_manifest
from dist_gan.data.order import holdout_mask
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.indexing import index
from dist_gan.packing.pack import pack
from dist_gan.pictures import encode_png
from dist_gan.types import TrainingFailed, UserError
from tests.services.own_store import own_store
from tests.unit.test_order_reference import reference

COUNT, BATCH, SEED = 60, 12, 11


def picture(number: int) -> np.ndarray:
    """Image number `number`, 16x16: noise, so that no turn of it is itself."""
    return np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def label_of(number: int) -> int:
    return number * 7 % 5 % 3


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(number: int) -> tuple[str, bytes]:
    return f"k{number:03d}.png", encode_png(picture(number))


def cls(number: int) -> tuple[str, bytes]:
    return f"k{number:03d}.cls", str(label_of(number)).encode()


def in_no_order(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    """Samples shuffled, now the image first and now the label."""
    shuffled = np.random.default_rng(5).permutation(numbers).tolist()
    assert shuffled != sorted(shuffled)
    return [m for n in shuffled for m in ((png(n), cls(n)) if n % 2 else (cls(n), png(n)))]


def labels_first(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    """All labels from the lowest key to the highest, then all images the other way round."""
    return [*map(cls, numbers), *map(png, reversed(numbers))]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 40 and 20 images as somebody else may have written them, and a manifest."""
    folder = tmp_path_factory.mktemp("foreign")
    write_tar(folder / "0.tar", in_no_order(range(40)))
    write_tar(folder / "1.tar", labels_first(range(40, COUNT)))
    index(str(folder), workers=1, progress=False, say=lambda sentence: None)
    return folder


def stream(
    url: Path | str, *, rank: int = 0, world_size: int = 1, classes: int = 3, stages: Any = (), **order: object
) -> ImageStream:
    section = ShardsData(url=str(url), **{"lanes": 4, "block": 5} | order)  # type: ignore[arg-type]
    return ImageStream(
        [(ShardFolder(str(url), read_manifest(str(url))), 1)],
        section=section, resolution=16, channels=3, classes=classes, batch=BATCH,
        slots=torch.arange(rank, BATCH, world_size), draws=Draws(SEED), stages=stages,
    )  # fmt: skip


def wanted_keys(manifest: Manifest, count: int, *, holdout: float = 0.0) -> list[str]:
    """The keys of the first positions of the order."""
    rows = [np.flatnonzero(~holdout_mask(shard.keys, share=holdout)).tolist() for shard in manifest.shards]
    line = reference([len(some) for some in rows], 4, 5, seed=SEED)
    return [manifest.shards[shard].keys[rows[shard][nth]] for shard, nth in islice(line, count)]


def as_input(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


# -- labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [in_no_order, labels_first])
@pytest.mark.parametrize("label_key", [None, "class"])
def test_a_label_goes_with_its_key_whatever_the_order_of_a_tars_members(
    written: Any, label_key: str | None, tmp_path: Path
) -> None:
    members = written(range(30))
    if label_key is not None:
        members = [
            (name.replace(".cls", ".json"), b'{"class": %s}' % data) if name.endswith("cls") else (name, data)
            for name, data in members
        ]
    write_tar(tmp_path / "a.tar", members)
    manifest = index(str(tmp_path), label_key=label_key, workers=1, progress=False, say=lambda sentence: None)
    check_against_the_tar(tmp_path, manifest)
    (shard,) = manifest.shards
    assert shard.labels == tuple(label_of(int(key[1:])) for key in shard.keys)
    assert [f"{key}.png" for key in shard.keys] == [name for name, _ in members if name.endswith("png")]


def check_against_the_tar(folder: Path, manifest: Manifest) -> None:
    """Every column of a manifest against what `tarfile` finds."""
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        with tarfile.open(folder / shard.name) as tar:
            members = {member.name: member for member in tar.getmembers()}
            for row, key in enumerate(shard.keys):
                image = members[f"{key}.{shard.extensions[row]}"]
                assert (shard.offsets[row], shard.sizes[row]) == (image.offset_data, image.size)
                label = members.get(f"{key}.cls")
                if label is not None and shard.labels is not None:
                    assert shard.labels[row] == int(data[label.offset_data : label.offset_data + label.size])


def test_packing_keeps_label_and_picture_with_their_key(tmp_path: Path) -> None:
    labels = [label_of(n) for n in range(COUNT)]
    pixels = np.stack([picture(n) for n in range(COUNT)])
    pack(ArraySource(pixels, labels), str(tmp_path), samples_per_shard=25, workers=1, progress=False)
    manifest = read_manifest(str(tmp_path))
    assert [len(shard.keys) for shard in manifest.shards] == [25, 25, 10]
    assert [shard.name for shard in manifest.shards] == [f"shard-{n:05d}.tar" for n in range(3)]
    keys = [key for shard in manifest.shards for key in shard.keys]
    assert sorted(keys) == [f"{n:08d}" for n in range(COUNT)]
    assert keys != sorted(keys)
    check_against_the_tar(tmp_path, manifest)
    for shard in manifest.shards:
        assert shard.labels == tuple(labels[int(key)] for key in shard.keys)
    source = stream(tmp_path)
    batch = source.next()
    source.close()
    for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
        assert torch.equal(image, as_input(picture(int(key))))
        assert int(label) == label_of(int(key))


# -- batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [0, 2**28])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_a_batch_holds_the_images_of_its_slots_with_their_labels_and_each_mirrored_by_its_own_chance(
    foreign: Path, cache: int, rank: int, world_size: int
) -> None:
    """Left and right change places for about half of the slots, others in every draw, hence the same image both ways."""
    keys = wanted_keys(read_manifest(str(foreign)), 20 * BATCH)
    source = stream(foreign, rank=rank, world_size=world_size, flip=True, cache=cache)
    slots = torch.arange(rank, BATCH, world_size)
    ways: dict[str, set[bool]] = {}
    for draw in range(20):
        batch = source.next()
        assert batch.draw == draw
        assert batch.slots.tolist() == slots.tolist()
        assert batch.keys == tuple(keys[draw * BATCH + slot] for slot in slots.tolist())
        mirrored = (Draws(SEED).uniform("flip", draw=draw, slots=slots) < 0.5).tolist()
        assert len(slots) < 12 or 0 < sum(mirrored) < len(slots)
        for image, label, key, turned in zip(batch.images, batch.labels, batch.keys, mirrored, strict=True):
            pixels = picture(int(key[1:]))
            assert torch.equal(image, as_input(pixels[:, ::-1] if turned else pixels))
            assert int(label) == label_of(int(key[1:]))
            ways.setdefault(key, set()).add(turned)
    source.close()
    assert sum(len(found) == 2 for found in ways.values()) > len(ways) / 4


def test_the_first_images_are_shown_as_they_are(foreign: Path) -> None:
    source = stream(foreign, flip=True)
    shown = source.preview(7)
    keys = wanted_keys(read_manifest(str(foreign)), 7)
    assert torch.equal(shown, torch.stack([as_input(picture(int(key[1:]))) for key in keys]))
    assert source.draw == 0


def test_the_state_counts_what_was_consumed_and_not_what_was_decoded_ahead(foreign: Path) -> None:
    keys = wanted_keys(read_manifest(str(foreign)), 9 * BATCH)
    source = stream(foreign, prefetch=7)
    assert source.values()["draw"] == 0
    for draw in range(4):
        source.next()
        assert source.values()["draw"] == source.draw == draw + 1
    kept = source.values()
    source.close()
    other = stream(foreign, prefetch=1)
    other.load_values(kept)
    assert other.next().keys == tuple(keys[4 * BATCH : 5 * BATCH])
    other.seek(8)
    batch = other.next()
    other.close()
    assert (batch.draw, batch.keys) == (8, tuple(keys[8 * BATCH :]))


@pytest.mark.parametrize("prefetch", [1, 3, 6])
def test_as_many_batches_are_decoded_ahead_as_was_said(foreign: Path, prefetch: int) -> None:
    """One is in the caller's hands, `prefetch` wait, and one more waits for room."""
    decoded: list[str] = []

    def counted(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            decoded.append(sample["__key__"])
            yield sample

    source = stream(foreign, prefetch=prefetch, stages=[counted])
    source.next()
    seen = -1
    while seen != len(decoded):
        seen = len(decoded)
        time.sleep(0.15)
    batches = len(decoded) / BATCH
    source.close()
    assert batches == prefetch + 2


def test_a_batch_that_several_threads_decode_is_put_together_in_its_order(tmp_path: Path) -> None:
    """Images of 512x512 are worth a thread for each four."""
    members = []
    for number in range(24):
        pixels = np.full((512, 512, 3), number, np.uint8)
        members += [(f"k{number:03d}.png", encode_png(pixels)), cls(number)]
    write_tar(tmp_path / "a.tar", members)
    manifest = index(str(tmp_path), workers=1, progress=False, say=lambda sentence: None)
    section = ShardsData(url=str(tmp_path), lanes=4, block=5, workers=3, prefetch=1)
    source = ImageStream(
        [(ShardFolder(str(tmp_path), manifest), 1)], section=section, resolution=512, channels=3, classes=3, batch=BATCH,
        slots=torch.arange(BATCH), draws=Draws(SEED),
    )  # fmt: skip
    keys = wanted_keys(manifest, 2 * BATCH)
    for draw in range(2):
        batch = source.next()
        assert batch.keys == tuple(keys[draw * BATCH :][:BATCH])
        numbers = [int(key[1:]) for key in batch.keys]
        assert batch.labels.tolist() == [label_of(n) for n in numbers]
        assert torch.allclose(batch.images[:, 0, 100, 100], torch.tensor(numbers) / 127.5 - 1)
    source.close()


# -- the split -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("split", ["train", "holdout"])
def test_a_scan_deals_a_split_out_in_the_order_of_the_shards_and_pads_the_end(
    foreign: Path, split: str, world_size: int
) -> None:
    manifest = read_manifest(str(foreign))
    wanted = [
        key
        for shard in manifest.shards
        for key, out in zip(shard.keys, holdout_mask(shard.keys, share=0.4), strict=True)
        if out == (split == "holdout")
    ]
    parts = [
        list(stream(foreign, holdout=0.4).scan(split, batch=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    rounds = -(-len(wanted) // (4 * world_size))
    assert [len(part) for part in parts] == [rounds] * world_size
    got = []
    for number in range(rounds):
        for part in parts:
            item = part[number]
            got += item.keys
            assert item.mask.tolist() == [row < len(item.keys) for row in range(4)]
            assert item.images.shape == (4, 3, 16, 16)
            for image, label, key in zip(item.images, item.labels, item.keys, strict=False):
                assert torch.equal(image, as_input(picture(int(key[1:]))))
                assert int(label) == label_of(int(key[1:]))
    assert got == wanted


# -- damage --------------------------------------------------------------------------------------------------------------


def stand_in(manifest: Manifest, key: str, bad: set[str], *, holdout: float = 0.0) -> str:
    """The next sound image of the shard that is trained on, of the same label if there is one, else of any."""
    shard = next(shard for shard in manifest.shards if key in shard.keys)
    out = holdout_mask(shard.keys, share=holdout)
    at = shard.keys.index(key)
    behind = [*range(at + 1, len(shard.keys)), *range(at)]
    sound = [row for row in behind if not out[row] and shard.keys[row] not in bad]
    assert shard.labels is not None
    alike = [row for row in sound if shard.labels[row] == shard.labels[at]]
    return shard.keys[(alike or sound)[0]]


@pytest.mark.parametrize(("rank", "world_size", "cache"), [(0, 1, 2**28), (0, 2, 0), (1, 2, 2**28)])
def test_a_damaged_image_is_replaced_by_the_next_of_its_label_in_its_shard_on_every_rank(
    foreign: Path, tmp_path: Path, rank: int, world_size: int, cache: int
) -> None:
    manifest = read_manifest(str(foreign))
    for path in foreign.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    trained = [
        (number, row)
        for number, shard in enumerate(manifest.shards)
        for row, out in enumerate(holdout_mask(shard.keys, share=0.2))
        if not out
    ]
    # One before a held-out image of its label, five in a row, and the last of a shard, behind which nothing comes.
    damaged = [trained[2], *trained[9:14], trained[-1]]
    bad = {manifest.shards[number].keys[row] for number, row in damaged}
    assert len({stand_in(manifest, key, bad, holdout=0.2) for key in bad}) > 2, "not all are replaced by the same"
    assert any(stand_in(manifest, key, bad) != stand_in(manifest, key, bad, holdout=0.2) for key in bad)
    for number, row in damaged:
        shard = manifest.shards[number]
        data = bytearray((tmp_path / shard.name).read_bytes())
        data[shard.offsets[row] + shard.sizes[row] - 20] ^= 1
        (tmp_path / shard.name).write_bytes(data)
    keys = wanted_keys(manifest, 10 * BATCH, holdout=0.2)
    source = stream(tmp_path, rank=rank, world_size=world_size, holdout=0.2, cache=cache, max_bad=0.5)
    met = set()
    for draw in range(10):
        batch = source.next()
        asked = [keys[draw * BATCH + slot] for slot in range(rank, BATCH, world_size)]
        met |= set(asked) & bad
        assert list(batch.keys) == [stand_in(manifest, k, bad, holdout=0.2) if k in bad else k for k in asked]
        for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
            assert torch.equal(image, as_input(picture(int(key[1:]))))
            assert int(label) == label_of(int(key[1:]))
    source.close()
    found = source.damaged()
    assert {item.key for item in found} >= met, "what was decoded ahead may be told of too"
    assert {item.key for item in found} <= bad
    assert all("CRC-32" in item.reason for item in found)
    assert len(found) == len({item.key for item in found}), "each is told of once"
    assert source.damaged() == []


def test_what_arrives_damaged_once_is_read_again_and_no_damage_and_not_kept(foreign: Path, tmp_path: Path) -> None:
    """Every piece is damaged when it is read first; later passes are served by the disk, which has sound ones."""
    with own_store() as store:
        for path in foreign.iterdir():
            store.objects[f"b/{path.name}"] = path.read_bytes()
        source = stream("gs://b", prefetch=1, cache=0, disk_cache=str(tmp_path))
        damaged: set[tuple[str, int, int]] = set()

        def damaged_at_first(path: str, start: int, end: int, data: bytes) -> bytes:
            if not path.endswith(".tar") or (path, start, end) in damaged or end - start < 2000:
                return data
            damaged.add((path, start, end))
            return data[:700] + bytes(byte ^ 1 for byte in data[700:-900]) + data[-900:]

        store.on_read = damaged_at_first
        keys = wanted_keys(read_manifest(str(foreign)), 20 * BATCH)
        for draw in range(20):
            if draw == 10:
                store.asked.clear()
            batch = source.next()
            assert batch.keys == tuple(keys[draw * BATCH :][:BATCH])
            assert all(
                torch.equal(image, as_input(picture(int(key[1:]))))
                for image, key in zip(batch.images, batch.keys, strict=True)
            )
        found = source.damaged()
        source.close()
    assert len(damaged) > 5, "something did arrive damaged"
    assert found == []
    assert store.reads() == []


@pytest.mark.parametrize(("share", "limit"), [(0.0, 1), (0.04, 2), (0.05, 3), (0.0499, 2)])
def test_so_many_images_may_be_damaged_and_not_one_more(foreign: Path, share: float, limit: int) -> None:
    """Of 60 images; one is always allowed; each counts once, whoever found it."""
    source = stream(foreign, max_bad=share)
    found = [Damage("0.tar", f"k{number:03d}", "cut") for number in range(limit + 1)]
    assert source.note_damaged(found[:limit]) == found[:limit]
    assert source.note_damaged(found[:limit]) == []
    assert source.num_damaged == limit
    kept = source.values()
    with pytest.raises(TrainingFailed, match=rf"{limit + 1} of 60 images are damaged, .* allows {limit};"):
        source.note_damaged(found[limit:])
    other = stream(foreign, max_bad=share)
    other.load_values(kept)
    with pytest.raises(TrainingFailed, match=rf"{limit + 1} of 60 images are damaged"):
        other.note_damaged(found[limit:])


# -- what is the same order ----------------------------------------------------------------------------------------------


def test_whatever_changes_the_order_changes_its_fingerprint_and_nothing_else_does(foreign: Path) -> None:
    kept = stream(foreign).fingerprint
    for same in ({"prefetch": 9}, {"workers": 5}, {"cache": 0}, {"memory": 2**25}, {"flip": True}, {"max_bad": 0.5}):
        assert stream(foreign, **same).fingerprint == kept, same
    for other in ({"lanes": 5}, {"block": 6}, {"holdout": 0.2}, {"balance": True}):
        assert stream(foreign, **other).fingerprint != kept, other
    source = ShardFolder(str(foreign), read_manifest(str(foreign)))
    common: dict[str, Any] = {"section": ShardsData(url="x", lanes=4, block=5), "resolution": 16, "channels": 3}

    def made(sources: list[tuple[ShardFolder, int]], *, batch: int = BATCH, seed: int = SEED) -> str:
        slots, draws = torch.arange(batch), Draws(seed)
        return ImageStream(sources, classes=3, batch=batch, slots=slots, draws=draws, **common).fingerprint

    assert made([(source, 1)]) == kept
    assert len({kept, made([(source, 1)], batch=10), made([(source, 1)], seed=1), made([(source, 2)])}) == 4


@pytest.mark.parametrize(
    ("networks", "told"),
    [
        ({"resolution": 32}, r"networks\.resolution: 32, but the shards at .* hold images of 16 pixels"),
        ({"channels": 1}, r"networks\.channels: 1, but the shards at .* hold images of 3"),
        ({"classes": 2}, r"networks\.classes: 2, but the shards at .* have 3 classes"),
        ({"classes": 4}, r"networks\.classes: 4, but the shards at .* have 3 classes"),
    ],
)
def test_networks_that_do_not_fit_the_images_are_refused(foreign: Path, networks: dict[str, int], told: str) -> None:
    fitting: dict[str, Any] = {"resolution": 16, "channels": 3, "classes": 3}
    with pytest.raises(UserError, match=told):
        ImageStream(
            [(ShardFolder(str(foreign), read_manifest(str(foreign))), 1)], section=ShardsData(url=str(foreign)),
            batch=BATCH, slots=torch.arange(BATCH), draws=Draws(SEED), **fitting | networks,
        )  # fmt: skip


def test_without_classes_there_are_no_labels_and_smaller_networks_get_averages(foreign: Path) -> None:
    source = ImageStream(
        [(ShardFolder(str(foreign), read_manifest(str(foreign))), 1)], section=ShardsData(url=str(foreign)), resolution=8,
        channels=3, classes=0, batch=BATCH, slots=torch.arange(BATCH), draws=Draws(SEED),
    )  # fmt: skip
    batch = source.next()
    source.close()
    assert batch.labels is None
    for image, key in zip(batch.images, batch.keys, strict=True):
        mean = picture(int(key[1:])).reshape(8, 2, 8, 2, 3).astype(float).mean(axis=(1, 3))
        assert torch.equal(image, as_input(np.floor(mean + 0.5).astype(np.uint8)))
