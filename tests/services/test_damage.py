"""Shards that were damaged: webdataset loses samples from them in silence; here each is found, replaced, and told of."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dist_gan import pictures
from dist_gan.data.manifest import Manifest, check_shards, read_manifest
from dist_gan.packing.indexing import index, verify
from dist_gan.types import TrainingFailed, UserError
from tests.conftest import ROOT, launch
from tests.scenarios.test_runs import events
from tests.services.test_stream import keys_of, stream


@pytest.fixture
def shards(small_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_shards, tmp_path / "shards"))


def payload(manifest: Manifest, row: int) -> tuple[int, int]:
    """Where the image of a row of the third shard is: first byte, and the one behind it."""
    shard = manifest.shards[2]
    return shard.offsets[row], shard.offsets[row] + shard.sizes[row]


def cut_at_a_sample(data: bytes, manifest: Manifest) -> bytes:
    return data[: payload(manifest, 60)[0] - 512]


def cut_inside_a_header(data: bytes, manifest: Manifest) -> bytes:
    return data[: payload(manifest, 60)[0] - 300]


def one_bad_byte_in_a_header(data: bytes, manifest: Manifest) -> bytes:
    at = payload(manifest, 60)[0] - 512 + 3
    return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]


def a_stray_block_of_zeros(data: bytes, manifest: Manifest) -> bytes:
    at = payload(manifest, 60)[0] - 512
    return data[:at] + bytes(1024) + data[at:]


WHOLE_FILES = (cut_at_a_sample, cut_inside_a_header, one_bad_byte_in_a_header, a_stray_block_of_zeros)


def read_by_webdataset(folder: Path) -> list[str]:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    handler = webdataset.warn_and_continue
    return [s["__key__"] for s in webdataset.WebDataset(urls, shardshuffle=False, handler=handler)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", WHOLE_FILES)
def test_a_damaged_tar_loses_samples_in_webdataset_and_none_is_missed_here(shards: Path, damage: object) -> None:
    manifest = read_manifest(str(shards))
    path = shards / manifest.shards[2].name
    path.write_bytes(damage(path.read_bytes(), manifest))  # type: ignore[operator]
    assert len(set(read_by_webdataset(shards))) < 700
    source = stream(shards, max_bad=0.2)
    seen = [key for batch in keys_of_open(source, 35) for key in batch]
    lost = set(manifest.shards[2].keys) - set(seen)
    damaged = {item.key for item in source.damaged()}
    source.close()
    assert len(seen) == 700, "the number of images does not change"
    assert damaged == lost, "what is not there was found, and told of"
    assert all(key in set(manifest.shards[2].keys) for key, n in Counter(seen).items() if n > 1), "from the same shard"
    if damage is one_bad_byte_in_a_header:
        assert not lost, "the images themselves are whole"
    else:
        assert 30 <= len(lost) <= 40
        with pytest.raises(UserError, match=r"the manifest says [\d,]+ bytes, the file has"):
            check_shards(str(shards), manifest)
        longer = damage is a_stray_block_of_zeros
        with pytest.raises(UserError, match="the file has"):
            check_shards(str(shards), manifest, may_lose=99 if longer else 39)
        notes = check_shards(str(shards), manifest, may_lose=100 if longer else 40)
        assert len(notes) == 1
        assert path.name in notes[0]
    assert any(path.name in problem for problem in verify(str(shards), workers=1, progress=False))


def keys_of_open(source: object, batches: int) -> list[tuple[str, ...]]:
    return [source.next().keys for _ in range(batches)]  # type: ignore[attr-defined]


def flip(shards: Path, row: int, *, at: int = 30) -> str:
    """Damages one image; its key."""
    manifest = read_manifest(str(shards))
    path = shards / manifest.shards[2].name
    data = bytearray(path.read_bytes())
    data[payload(manifest, row)[0] + at] ^= 4
    path.write_bytes(data)
    return manifest.shards[2].keys[row]


def test_a_flipped_bit_is_found_by_its_checksum_and_replaced_by_the_next_image_of_its_class(shards: Path) -> None:
    key = flip(shards, 10)
    entry = read_manifest(str(shards)).shards[2]
    assert entry.labels is not None
    instead = next(k for k, label in zip(entry.keys[11:], entry.labels[11:], strict=True) if label == entry.labels[10])
    damaged, sound = stream(shards), stream(shards, bad_images="fail")
    seen = [key for batch in keys_of_open(damaged, 70) for key in batch]
    assert key not in seen
    assert seen.count(instead) == 4, "twice in each of two passes"
    (found,) = damaged.damaged()
    assert found.key == key
    assert found.url.endswith(entry.name)
    assert "CRC-32" in found.reason
    damaged.close()
    with pytest.raises(
        TrainingFailed, match=rf"{entry.name}: {key}: its bytes do not have the CRC-32 .*dist-gan verify"
    ):
        keys_of(sound, 35)


def test_what_takes_a_damaged_images_place_depends_on_the_data_alone(shards: Path) -> None:
    for row in (3, 10, 11, 12, 99):
        flip(shards, row)
    alone = [stream(shards, prefetch=p, cache=c, workers=w) for p, c, w in ((1, 0, 1), (6, 0, 4), (4, 2**28, 2))]
    sequences = [keys_of_open(source, 70) for source in alone]
    for source in alone:
        source.close()
    assert sequences[0] == sequences[1] == sequences[2]
    parts = [keys_of(stream(shards, rank=rank, world_size=4), 70) for rank in range(4)]
    for number, batch in enumerate(sequences[0]):
        assert batch == tuple(parts[slot % 4][number][slot // 4] for slot in range(20))
    late = stream(shards)
    late.seek(50)
    assert keys_of_open(late, 20) == sequences[0][50:]
    late.close()


def test_pictures_that_cannot_be_decoded_are_damage_too(tmp_path: Path) -> None:
    """Whole tars with honest checksums of files that are no whole pictures, as a bad download leaves them."""

    def jpeg(seed: int) -> bytes:
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        return file.getvalue()

    files = {f"{k:04d}.jpg": jpeg(k) for k in range(60)}
    files["0007.jpg"] = files["0007.jpg"][:-100]
    files["0011.jpg"] = files["0011.jpg"][:640]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {**files, "readme.txt": b"foreign", "0003.thumbnail.png": b"foreign"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index(str(tmp_path), workers=1, progress=False, say=lambda text: None)
    source = stream(tmp_path, classes=0, max_bad=0.1)
    seen = {key for batch in keys_of_open(source, 3) for key in batch}
    bad = {item.key for item in source.damaged()}
    source.close()
    assert bad == {"0007", "0011"}
    assert seen == {f"{k:04d}" for k in range(60)} - bad


def test_a_decompression_bomb_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    def png(side: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (side, side)).save(file, "PNG")
        return file.getvalue()

    assert len(png(9000)) < 200_000
    with pytest.raises(pictures.BadImage, match="more than 67,108,864 pixels"):
        pictures.decode(png(9000), name="bomb")
    file = io.BytesIO()
    Image.new("RGB", (9000, 9000)).save(file, "JPEG", quality=1)
    with pytest.raises(pictures.BadImage, match="more than 67,108,864 pixels"):
        pictures.decode(file.getvalue(), name="bomb", out=np.empty((16, 16, 3), np.uint8), reduce_to=16)


def test_a_file_that_is_gone_is_no_damage_and_ends_the_run(shards: Path) -> None:
    manifest = read_manifest(str(shards))
    (shards / manifest.shards[2].name).unlink()
    with pytest.raises(TrainingFailed, match=rf"cannot read .*{manifest.shards[2].name}: No such file"):
        keys_of(stream(shards), 35)
    with pytest.raises(UserError, match="it is not there"):
        check_shards(str(shards), manifest, may_lose=700)


def test_more_damage_than_was_allowed_ends_the_run_with_examples(shards: Path) -> None:
    source = stream(shards, max_bad=0.01)
    from dist_gan.data.decoding import Damage

    found = [Damage("shard.tar", f"key-{k}", "its bytes do not have the CRC-32 of the manifest") for k in range(8)]
    assert len(source.note_damaged(found[:5])) == 5
    assert source.note_damaged(found[:5]) == [], "each is told of once"
    with pytest.raises(
        TrainingFailed, match=r"(?s)8 of 700 images are damaged, and data.max_bad=0.01 allows 7;.*key-7"
    ):
        source.note_damaged(found)


def test_a_restart_does_not_tell_of_the_same_damage_again(shards: Path) -> None:
    flip(shards, 10)
    first = stream(shards)
    keys_of_open(first, 35)
    assert len(first.note_damaged(first.damaged())) == 1
    kept = json.loads(json.dumps(first.values()))
    first.close()
    second = stream(shards)
    second.load_values(kept)
    keys_of_open(second, 35)
    assert second.note_damaged(second.damaged()) == []
    assert second.num_damaged == 1
    second.close()


def test_two_processes_tell_of_every_damaged_image_once_in_events_and_go_on(shards: Path, tmp_path: Path) -> None:
    bad = sorted(flip(shards, row) for row in (3, 10, 11, 50))
    run = tmp_path / "run"
    done = launch(
        ROOT / "train.py",
        [
            "configs/dcgan-cifar10.yaml", f"data.url={shards}", f"run.dir={run}", "run.images=1920", "run.batch=32",
            "networks.resolution=16", "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8",
            "log.samples=4", "log.every=320", "runtime.threads=1", "data.max_bad=0.01",
        ],
        processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [event for event in events(run) if event["event"] == "bad_sample"]
    assert sorted(event["key"] for event in told) == bad
    assert all(event["url"].endswith(".tar") and "CRC-32" in event["reason"] for event in told)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/damaged"] == 4


def test_large_photographs_are_decoded_at_a_fraction_of_their_size_and_look_the_same(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=92)
    whole = pictures.decode(file.getvalue(), name="photo")
    scaled = pictures.decode(file.getvalue(), name="photo", reduce_to=32)
    assert whole.shape == (768, 1024, 3)
    assert scaled.shape[0] in range(64, 193), scaled.shape
    exact, quick = (pictures.fit(p, resolution=32, channels=3).astype(int) for p in (whole, scaled))
    assert np.abs(exact - quick).mean() < 1.0
    assert np.abs(exact - quick).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_with_an_orientation_is_turned_as_ever(orientation: int) -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    got = pictures.decode(file.getvalue(), name="photo")
    assert np.array_equal(got, pictures.examine(file.getvalue(), name="photo").pixels)
    assert got.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
