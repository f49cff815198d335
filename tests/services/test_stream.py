"""The stream hands out every image once a pass, in an order that ranks, prefetching and interruptions do not change."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from dist_gan import images, storage
from dist_gan.config import ShardsData
from dist_gan.data.decoding import Sample, Stage
from dist_gan.data.manifest import read_manifest
from dist_gan.data.pack import pack
from dist_gan.data.pieces import Source
from dist_gan.data.sources import ArraySource
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.types import TrainingFailed, UserError, byte_range
from tests.conftest import random_images


def stream(
    url: Path | str,
    *,
    batch: int = 20,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    classes: int = 5,
    stages: Sequence[Stage] = (),
    **order: float | str | dict[str, int],
) -> ImageStream:
    settings = {"lanes": 8, "block": 16} | order
    return ImageStream(
        [(Source(str(url), read_manifest(str(url))), 1)],
        section=ShardsData(url=str(url), **settings),
        resolution=16,
        channels=3,
        classes=classes,
        batch=batch,
        slots=torch.arange(rank, batch, world_size),
        draws=Draws(seed),
        stages=stages,
    )


def keys_of(source: ImageStream, batches: int) -> list[tuple[str, ...]]:
    found = [source.next().keys for _ in range(batches)]
    source.close()
    return found


def test_a_pass_shows_every_image_once_and_the_next_pass_in_another_order(small_shards: Path) -> None:
    batches = keys_of(stream(small_shards), 70)
    first = [k for batch in batches[:35] for k in batch]
    second = [k for batch in batches[35:] for k in batch]
    assert len(set(first)) == len(first) == 700
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("world_size", [2, 4, 5])
def test_ranks_share_the_sequence_of_one_process(small_shards: Path, world_size: int) -> None:
    alone = keys_of(stream(small_shards), 40)
    parts = [keys_of(stream(small_shards, rank=r, world_size=world_size), 40) for r in range(world_size)]
    for number, batch in enumerate(alone):
        assert batch == tuple(parts[slot % world_size][number][slot // world_size] for slot in range(20))


@pytest.mark.parametrize("prefetch", [1, 7])
def test_prefetching_and_interruptions_change_nothing(small_shards: Path, prefetch: int) -> None:
    undisturbed = stream(small_shards, flip=True)
    wanted = [undisturbed.next() for _ in range(12)]
    undisturbed.close()
    got = []
    source = stream(small_shards, flip=True, prefetch=prefetch)
    for stop in (1, 5, 6, 12):
        while source.draw < stop:
            got.append(source.next())
        kept = source.values()
        source.close()
        source = stream(small_shards, flip=True, prefetch=prefetch)
        source.load_values(kept)
    for a, b in zip(wanted, got, strict=True):
        assert a.keys == b.keys
        assert a.draw == b.draw
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_images_and_labels_are_those_that_were_packed(tmp_path: Path) -> None:
    pixels = random_images(60, resolution=16)
    pack(ArraySource(pixels, np.arange(60) % 5), str(tmp_path), workers=1)
    source = stream(tmp_path, batch=30)
    for batch in (source.next(), source.next()):
        for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
            row = int(key)
            assert int(label) == row % 5
            assert torch.equal(image, torch.from_numpy(pixels[row]).permute(2, 0, 1).float() / 127.5 - 1)
    source.close()


def test_what_fits_into_the_cache_is_decoded_once_and_nothing_else_changes(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = images.decode

    def counted(data: bytes, *, name: str, **options: object) -> images.Pixels:
        decoded.append(name)
        return decode(data, name=name, **options)

    monkeypatch.setattr(images, "decode", counted)
    found, counts = [], []
    for cache in (700 * 16 * 16 * 3, 700 * 16 * 16 * 3 - 1):
        source = stream(small_shards, cache=cache, prefetch=1)
        found.append([source.next() for _ in range(70)])
        source.close()
        counts.append(len(decoded))
        decoded.clear()
    assert counts[0] == 700
    assert counts[1] >= 1400
    for a, b in zip(*found, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def test_a_held_out_image_is_never_trained_on_and_a_scan_reads_each_split_once(small_shards: Path) -> None:
    source = stream(small_shards, holdout=0.2)
    splits = {}
    for split in ("train", "holdout"):
        parts = [list(source.scan(split, batch=16, rank=rank, world_size=3)) for rank in range(3)]
        assert len({len(part) for part in parts}) == 1, "no rank waits for another"
        splits[split] = [key for part in parts for item in part for key in item.keys]
        assert sum(int(item.mask.sum()) for part in parts for item in part) == len(splits[split])
        assert all(item.images.shape == (16, 3, 16, 16) for part in parts for item in part)
    assert 90 < len(splits["holdout"]) < 190
    assert len(set(splits["train"] + splits["holdout"])) == len(splits["train"] + splits["holdout"]) == 700
    trained = {k for batch in keys_of(source, 60) for k in batch}
    assert trained == set(splits["train"])


def test_the_held_out_split_survives_repacking_in_other_shards(small_shards: Path, tmp_path: Path) -> None:
    pack(
        ArraySource(random_images(700, resolution=16), np.arange(700) % 5),
        str(tmp_path),
        samples_per_shard=333,
        workers=1,
    )
    splits = [
        {k for item in stream(url, holdout=0.1).scan("holdout", batch=50, rank=0, world_size=1) for k in item.keys}
        for url in (small_shards, tmp_path)
    ]
    assert splits[0] == splits[1]


def test_another_order_than_the_checkpoints_is_refused(small_shards: Path) -> None:
    kept = stream(small_shards).values()
    for other in (stream(small_shards, seed=1), stream(small_shards, lanes=4), stream(small_shards, holdout=0.1)):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            other.load_values(kept)


def test_shards_in_memory_are_read_through_the_same_door(small_shards: Path) -> None:
    for name in storage.list_names(str(small_shards)):
        storage.publish(f"memory://bucket/shards/{name}", (small_shards / name).read_bytes())
    assert keys_of(stream("memory://bucket/shards"), 5) == keys_of(stream(small_shards), 5)


def test_larger_images_are_brought_to_size_by_the_rules_of_packing(tmp_path: Path) -> None:
    pixels = random_images(8, resolution=32)
    pack(ArraySource(pixels), str(tmp_path), workers=1)
    source = stream(tmp_path, batch=8, classes=0)
    batch = source.next()
    source.close()
    wanted = images.fit(pixels[int(batch.keys[0])], resolution=16, channels=3)
    assert torch.equal(batch.images[0], torch.from_numpy(wanted.copy()).permute(2, 0, 1).float() / 127.5 - 1)
    assert batch.labels is None


def test_a_shard_that_was_cut_short_is_named(small_shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_shards, tmp_path / "copy"))
    shard = next(copy.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:2000])
    source = stream(copy, bad_images="fail")
    with pytest.raises(
        TrainingFailed, match=rf"{shard.name}: .*: \d+ of its [\d,]+ bytes are there; run `dist-gan verify"
    ):
        keys_of(source, 40)


def test_a_users_own_stage_drops_into_the_pipeline(small_shards: Path) -> None:
    def inverted(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            sample["pixels"] = 255 - sample["pixels"]
            yield sample

    plain, changed = stream(small_shards), stream(small_shards, stages=[inverted])
    for _ in range(3):
        one, other = plain.next(), changed.next()
        assert one.keys == other.keys
        assert torch.equal(byte_range(one.images), 255 - byte_range(other.images))
    with pytest.raises(UserError, match="not those of the checkpoint"):
        changed.load_values(plain.values())
    plain.close()
    changed.close()


def test_a_stage_may_be_one_of_webdatasets_own(small_shards: Path) -> None:
    mirrored = webdataset.map_dict(pixels=lambda pixels: pixels[:, ::-1].copy())
    plain, changed = stream(small_shards), stream(small_shards, stages=[mirrored])
    assert torch.equal(plain.next().images.flip(3), changed.next().images)
    plain.close()
    changed.close()


def drops_one(samples: Iterable[Sample]) -> Iterator[Sample]:
    yield from islice(samples, 1, None)


def doubles(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        yield sample


def crops(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"pixels": sample["pixels"][:8]}


@pytest.mark.parametrize(
    ("stage", "told"), [(drops_one, "gave fewer"), (doubles, "gave more"), (crops, r"\(8, 16, 3\)")]
)
def test_a_stage_that_changes_the_sequence_or_the_shape_ends_the_run(
    small_shards: Path, stage: Stage, told: str
) -> None:
    source = stream(small_shards, stages=[stage])
    with pytest.raises(TrainingFailed, match=told):
        source.next()
