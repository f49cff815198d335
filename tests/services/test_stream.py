"""The stream hands out every image once a pass, in an order that ranks, prefetching and interruptions do not change."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from dist_gan import pictures, storage
from dist_gan.config import ShardsData
from dist_gan.data.decoding import Sample, Stage
from dist_gan.data.manifest import read_manifest
from dist_gan.data.order import holdout_mask
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack
from dist_gan.types import TrainingFailed, UserError, byte_range
from tests.conftest import ROOT, launch, random_images


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
        [(ShardFolder(str(url), read_manifest(str(url))), 1)],
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


def test_images_and_labels_are_those_that_were_packed_however_long_they_are_kept(tmp_path: Path) -> None:
    pixels = random_images(60, resolution=16)
    pack(ArraySource(pixels, np.arange(60) % 5), str(tmp_path), workers=1)
    source = stream(tmp_path, batch=30, cache=0)
    for batch in [source.next() for _ in range(40)]:
        for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
            row = int(key)
            assert int(label) == row % 5
            assert torch.equal(image, torch.from_numpy(pixels[row]).permute(2, 0, 1).float() / 127.5 - 1)
    source.close()


def test_what_fits_into_the_cache_is_decoded_once_and_nothing_else_changes(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = pictures.decode

    def counted(data: bytes, *, name: str, **options: object) -> pictures.Pixels:
        decoded.append(name)
        return decode(data, name=name, **options)

    monkeypatch.setattr(pictures, "decode", counted)
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
    wanted = pictures.fit(pixels[int(batch.keys[0])], resolution=16, channels=3)
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


# -- balanced and mixed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images: 240 of class 0, 50 of class 1, 10 of class 2."""
    folder = tmp_path_factory.mktemp("uneven")
    labels = np.repeat([0, 1, 2], [240, 50, 10])
    source = ArraySource(random_images(300, resolution=16, seed=5), labels, class_names=("many", "some", "few"))
    pack(source, str(folder), samples_per_shard=64, workers=1)
    return folder


def test_balanced_drawing_shows_every_class_equally_often_and_each_class_image_by_image(uneven_shards: Path) -> None:
    source = stream(uneven_shards, classes=3, batch=30, balance=True)
    batches = [source.next() for _ in range(24)]
    source.close()
    for batch in batches:
        assert np.bincount(batch.labels.numpy(), minlength=3).tolist() == [10, 10, 10]
    keys = [
        key for batch in batches for key, label in zip(batch.keys, batch.labels.tolist(), strict=True) if label == 2
    ]
    for start in range(0, 240, 10):
        assert len(set(keys[start : start + 10])) == 10, "each pass over the smallest class shows each image once"
    many = [k for batch in batches for k, label in zip(batch.keys, batch.labels.tolist(), strict=True) if label == 0]
    assert len(set(many)) == len(many) == 240


def test_balance_needs_classes(tmp_path: Path) -> None:
    pack(ArraySource(random_images(20, resolution=16)), str(tmp_path), workers=1)
    with pytest.raises(UserError, match=r"data.balance: the images of .* have no classes"):
        stream(tmp_path, classes=0, balance=True)


def mixed(
    urls: dict[Path, int], *, rank: int = 0, world_size: int = 1, batch: int = 20, **order: object
) -> ImageStream:
    first = str(next(iter(urls)))
    return ImageStream(
        [(ShardFolder(str(url), read_manifest(str(url))), weight) for url, weight in urls.items()],
        section=ShardsData(url=first, **{"lanes": 8, "block": 16} | order),  # type: ignore[arg-type]
        resolution=16, channels=3, classes=0, batch=batch, slots=torch.arange(rank, batch, world_size), draws=Draws(0),
    )  # fmt: skip


def test_a_mixture_is_exact_and_the_same_over_ranks_and_interruptions(small_shards: Path, uneven_shards: Path) -> None:
    urls = {small_shards: 3, uneven_shards: 1}
    alone = mixed(urls)
    batches = [alone.next() for _ in range(60)]
    parts = [mixed(urls, rank=rank, world_size=2) for rank in range(2)]
    parts[1].seek(30)
    for number, batch in enumerate(batches[:10]):
        assert batch.keys[0::2] == parts[0].next().keys, number
        assert batches[30 + number].keys[1::2] == parts[1].next().keys
    for source in (alone, *parts):
        source.close()
    single = stream(small_shards, classes=0, batch=15)
    wanted = [single.next() for _ in range(40)]
    single.close()
    got = torch.cat([batch.images for batch in batches[:40]])
    first = {image.numpy().tobytes() for batch in wanted for image in batch.images}
    assert sum(image.numpy().tobytes() in first for image in got) == 600, "three of every four"


def test_a_mixture_has_another_order_than_any_other_weights(small_shards: Path, uneven_shards: Path) -> None:
    kept = mixed({small_shards: 3, uneven_shards: 1}).values()
    for other in ({small_shards: 1, uneven_shards: 1}, {small_shards: 3}, {uneven_shards: 3, small_shards: 1}):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            mixed(other).load_values(kept)


def test_balance_mixture_flips_and_a_held_out_share_have_their_effect_through_a_launch(
    small_shards: Path, uneven_shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    pixels, labels = random_images(90, resolution=16, seed=8), np.repeat([0, 1, 2], [60, 20, 10])
    pack(ArraySource(pixels, labels, class_names=("many", "some", "few")), str(other), workers=1)
    known: dict[str, tuple[int, str, int, bool]] = {}
    for source, (faces, seed_labels) in enumerate(
        [(random_images(300, resolution=16, seed=5), np.repeat([0, 1, 2], [240, 50, 10])), (pixels, labels)]
    ):
        for row, image in enumerate(faces.transpose(0, 3, 1, 2)):
            for mirrored, shown in enumerate((image, image[:, :, ::-1])):
                digest = hashlib.sha256(np.ascontiguousarray(shown).tobytes()).hexdigest()
                known[digest] = (source, f"{row:08d}", int(seed_labels[row]), bool(mirrored))
    arguments = [
        "configs/dcgan-cifar10.yaml", f"data.url={uneven_shards}", f"data.mix={{{str(other)!r}: 1}}", "data.weight=3",
        "data.balance=true", "data.flip=true", "data.holdout=0.2", "data.lanes=8", "data.block=8", "networks.classes=3",
        f"run.dir={tmp_path / 'run'}", "run.images=960", "run.batch=24", "networks.resolution=16", "networks.g_width=4",
        "networks.d_width=4", "networks.latent_dim=8", "log.samples=4", "runtime.threads=1",
    ]  # fmt: skip
    done = launch(
        ROOT / "tests" / "dist" / "instrumented.py", [str(tmp_path / "out"), "record", *arguments], processes=2
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    slots: dict[int, tuple[str, int, str]] = {}
    for file in (tmp_path / "out").glob("rank-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            rows = zip(line["slots"], line["keys"], line["labels"], line["images"], strict=True)
            slots.update({24 * line["draw"] + slot: (key, label, image) for slot, key, label, image in rows})
    seen = [slots[position] for position in range(960)]
    facts = [known[image] for _, _, image in seen]
    assert [fact[1:3] for fact in facts] == [(key, label) for key, label, _ in seen]
    sources = np.array([fact[0] for fact in facts])
    assert sources.reshape(-1, 4).sum(1).tolist() == [1] * 240, "of every four images one comes from the other folder"
    for source, count in ((0, 720), (1, 240)):
        drawn = np.bincount([fact[2] for fact in facts if fact[0] == source], minlength=3)
        assert drawn.tolist() == [count // 3] * 3, "every class equally often"
    keys = [f"{row:08d}" for row in range(300)]
    held = {key for key, out in zip(keys, holdout_mask(keys, share=0.2), strict=True) if out}
    assert 30 < len(held) < 90
    assert held.isdisjoint(fact[1] for fact in facts)
    assert {fact[1] for fact in facts if fact[0] == 0 and fact[2] == 1} == set(keys[240:290]) - held
    assert 400 < sum(fact[3] for fact in facts) < 560, "about half of them mirrored"


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "by_block"), [(2**29, True), (2**20, False)])
def test_what_is_held_stays_within_its_bound(tmp_path: Path, memory: int, by_block: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 32, 32, 3), dtype=np.uint8)
    pack(ArraySource(pixels), str(tmp_path), samples_per_shard=300, workers=1)
    source = stream(tmp_path, classes=0, cache=0, memory=memory, lanes=16, block=32)
    assert source._plan.by_block == by_block
    assert source._plan.memory <= memory
    keys = keys_of(source, 150)
    assert sorted(k for batch in keys[:75] for k in batch) == sorted(k for batch in keys[75:] for k in batch)
    assert 0 < source.most_bytes <= source._plan.memory


def test_a_piece_that_is_read_singly_gives_the_same_images_as_a_block(small_shards: Path) -> None:
    blocks, singles = stream(small_shards, cache=0), stream(small_shards, cache=0)
    singles._plan.by_block = False
    assert keys_of(blocks, 40) == keys_of(singles, 40)
