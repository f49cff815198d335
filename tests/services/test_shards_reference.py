"""Shards and manifests against `tarfile`, `hashlib` and `zlib`; what a pack finds out about images before it packs them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_gan.data.manifest import Manifest, Shard, check_shards, read_manifest
from dist_gan.packing import fetching
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.fetching import prefetch
from dist_gan.packing.indexing import index, verify
from dist_gan.packing.pack import pack
from dist_gan.packing.sources import open_source
from dist_gan.packing.survey import count_headers, describe_sizes, is_resolution, sum_counts
from dist_gan.packing.tar_scan import DamagedTar, TarScan
from dist_gan.pictures import encode_png
from dist_gan.types import UserError
from tests.services.own_store import own_store
from tests.services.test_stream_reference import cls, picture, png, write_tar


def photo(height: int, width: int, kind: str = "PNG", mode: str = "RGB", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


# -- columns -------------------------------------------------------------------------------------------------------------


def columns_by_hand(path: Path) -> dict[str, object]:
    """What a manifest must say of a tar, in the order of its images."""
    data = path.read_bytes()
    rows = []
    labels = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            key, _, extension = member.name.rpartition(".")
            content = data[member.offset_data : member.offset_data + member.size]
            if extension == "cls":
                labels[key] = int(content)
            else:
                rows.append((key, member.offset_data, member.size, extension, zlib.crc32(content)))
    keys, offsets, sizes, extensions, sums = zip(*rows, strict=True)
    return {
        "name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "keys": list(keys),
        "offsets": list(offsets), "sizes": list(sizes), "crc32": list(sums), "labels": [labels[key] for key in keys],
        "extensions": extensions[0] if len(set(extensions)) == 1 else list(extensions),
    }  # fmt: skip


@pytest.mark.parametrize("how", ["pack", "index"])
def test_every_column_of_a_manifest_is_what_others_find_in_the_tar(how: str, tmp_path: Path) -> None:
    if how == "pack":
        for number in range(12):
            folder = tmp_path / "photos" / "abc"[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            kind = "JPEG" if number % 2 else "PNG"
            (folder / f"{number}.{kind.lower()}").write_bytes(photo(32, 32, kind, seed=number))
        folder = tmp_path / "shards"
        pack(open_source(str(tmp_path / "photos")), str(folder), samples_per_shard=5, workers=1, progress=False)
    else:
        folder = tmp_path
        write_tar(folder / "b.tar", [m for n in (3, 1, 2) for m in (cls(n), png(n))])
        write_tar(folder / "a.tar", [m for n in (9, 7) for m in (png(n), cls(n))])
        index(str(folder), workers=1, progress=False, say=lambda sentence: None)
    content = json.loads((folder / "manifest.json").read_bytes())
    paths = sorted(folder.glob("*.tar"))
    assert content["shards"] == [columns_by_hand(path) for path in paths]
    labels = [label for shard in content["shards"] for label in shard["labels"]]
    assert content["class_counts"] == [labels.count(label) for label in range(len(content["classes"]))]
    assert content["classes"] == (["a", "b", "c"] if how == "pack" else [str(n) for n in range(max(labels) + 1)])
    assert (content["resolution"], content["channels"]) == ((32, 3) if how == "pack" else (16, 3))
    if how == "pack":
        by_class = {"a": 0, "b": 1, "c": 2}
        for shard in content["shards"]:
            assert shard["labels"] == [by_class[key.split("/")[0]] for key in shard["keys"]]
        assert [len(shard["keys"]) for shard in content["shards"]] == [5, 5, 2]
        with tarfile.open(paths[0]) as tar:
            for member in tar.getmembers():
                name = Path(member.name)
                if name.suffix != ".cls":
                    kind = "jpeg" if name.suffix == ".jpg" else "png"
                    original = (tmp_path / "photos" / name.with_suffix(f".{kind}")).read_bytes()
                    assert tar.extractfile(member).read() == original, "what fits keeps its bytes"  # type: ignore[union-attr]
    assert verify(str(folder), workers=1, progress=False) == []


SHARD = Shard(
    name="a.tar", bytes=4000, sha256="0" * 64, keys=("a", "b", "c"), offsets=(512, 1536, 2560), sizes=(400, 500, 600),
    extensions=("png",) * 3, labels=(0, 1, 1), crc32=(1, 2, 3),
)  # fmt: skip
WHOLE = Manifest(resolution=16, channels=3, classes=("x", "y"), shards=(SHARD,), origin="by hand")


def test_everything_about_the_samples_is_part_of_a_manifests_fingerprint() -> None:
    changes = {
        "name": "b.tar", "bytes": 4001, "sha256": "1" * 64, "keys": ("a", "b", "d"), "offsets": (512, 1536, 2561),
        "sizes": (400, 500, 601), "extensions": ("png", "jpg", "png"), "labels": (0, 0, 1), "crc32": (1, 2, 4),
    }  # fmt: skip
    found = {WHOLE.fingerprint}
    for name, value in changes.items():
        found.add(replace(WHOLE, shards=(replace(SHARD, **{name: value}),)).fingerprint)
    for name, value in {"resolution": 32, "channels": 1, "classes": ("x", "z")}.items():
        found.add(replace(WHOLE, **{name: value}).fingerprint)
    found.add(replace(WHOLE, shards=(SHARD, replace(SHARD, name="b.tar"))).fingerprint)
    assert len(found) == 1 + len(changes) + 3 + 1
    assert replace(WHOLE, origin="elsewhere").fingerprint == WHOLE.fingerprint
    assert WHOLE.class_counts == (1, 2)
    assert replace(WHOLE, classes=None).class_counts is None


@pytest.mark.parametrize(
    ("size", "lost"), [(4000, 0), (3999, 0), (3160, 0), (3159, 1), (2036, 1), (2035, 2), (512, 3), (4001, 3), (None, 3)]
)
def test_a_shard_has_lost_the_images_that_do_not_end_inside_of_it(size: int | None, lost: int, tmp_path: Path) -> None:
    """Of a longer file all images are in doubt; of an absent one none can be read at all."""
    if size is not None:
        (tmp_path / "a.tar").write_bytes(bytes(size))
    if size == 4000:
        assert check_shards(str(tmp_path), WHOLE) == []
        return
    with pytest.raises(UserError, match="the manifest says 4,000 bytes"):
        check_shards(str(tmp_path), WHOLE)
    if size is None:
        with pytest.raises(UserError, match="it is not there"):
            check_shards(str(tmp_path), WHOLE, may_lose=3)
        return
    (note,) = check_shards(str(tmp_path), WHOLE, may_lose=lost)
    assert f"has {size:,} bytes, the manifest says 4,000; up to {lost} of its images" in note
    if lost:
        with pytest.raises(UserError, match=f"the file has {size:,}"):
            check_shards(str(tmp_path), WHOLE, may_lose=lost - 1)


# -- the scan of a tar ---------------------------------------------------------------------------------------------------


def scanned(data: bytes) -> TarScan:
    return TarScan(io.BytesIO(data), size=len(data), place="x")


def test_a_scan_hashes_every_byte_and_gives_every_member_its_own_bytes(tmp_path: Path) -> None:
    members = [("a.png", b"x" * 511), ("b.png", b"y" * 512), ("c.png", b"z" * 513), ("d.png", b""), ("e.png", b"e")]
    write_tar(tmp_path / "a.tar", members)
    data = (tmp_path / "a.tar").read_bytes()
    scan = scanned(data)
    found = list(scan)
    assert [(m.name, m.data) for m in found] == members
    assert all(data[m.offset : m.offset + m.size] == m.data for m in found)
    assert scan.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("at", [0, 99, 124, 135, 148, 156, 257, 345, 511])
def test_a_flipped_bit_anywhere_in_a_header_is_seen(at: int, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", b"1"), ("b.png", b"2")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 + at] ^= 1
    with pytest.raises(DamagedTar) as caught:
        list(scanned(bytes(data)))
    assert caught.value.offset == 1024


def test_headers_of_old_programs_that_added_signed_bytes_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("größe.png", b"1")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    signed = sum(byte - 256 * (byte > 127) for byte in data[:148] + b" " * 8 + data[156:512])
    data[148:156] = b"%06o\0 " % signed
    assert [m.name for m in scanned(bytes(data))] == ["größe.png"]


# -- the survey ----------------------------------------------------------------------------------------------------------


def test_a_resolution_is_a_power_of_two_from_16_to_1024() -> None:
    assert [side for side in range(2100) if is_resolution(side)] == [16, 32, 64, 128, 256, 512, 1024]


@pytest.mark.parametrize("place", ["folder", "store"])
def test_sizes_and_channels_are_counted_from_the_headers(place: str, tmp_path: Path) -> None:
    """One photograph is larger than its beginning that is fetched, another has its size behind a long comment."""
    files = {
        "a.png": photo(16, 16), "b.png": photo(16, 24), "c.png": photo(16, 24, mode="L"), "d.jpg": photo(300, 300, "PNG"),
        "e.jpg": b"\xff\xd8" + (b"\xff\xfe\xea\x60" + bytes(59998)) * 2 + photo(16, 24, "JPEG")[2:], "f.png": b"no picture",
    }  # fmt: skip
    assert len(files["d.jpg"]) > 2**16
    with own_store() as store:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            store.objects[f"b/{name}"] = data
        source = open_source(str(tmp_path) if place == "folder" else "gs://b")
        told: list[int] = []
        found = count_headers(source.reader, source.entries, told.append)
        if place == "store":
            large = [(start, end) for path, start, end in store.reads() if path == "b/d.jpg"]
            assert large == [(0, 2**16)], "of a large picture its beginning is enough"
    assert found.sizes == Counter({(16, 24): 3, (16, 16): 1, (300, 300): 1})
    assert found.channels == Counter({3: 4, 1: 1})
    assert [problem.member for problem in found.problems] == ["f.png"]
    assert sum(told) == 6
    twice = sum_counts([found, found])
    assert twice.sizes == Counter({(16, 24): 6, (16, 16): 2, (300, 300): 2})
    assert twice.channels == Counter({3: 8, 1: 2})
    assert describe_sizes(found.sizes) == "24x16 (3), 16x16 (1), 300x300 (1)", "width x height, the most frequent first"


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([(28, 28)], r"found 28x28 \(1\); give --resolution 32 --pad .* or --resolution 16 \(cropped"),
        ([(40, 90), (33, 50)], r"give --resolution 32 \(cropped to squares and averaged down\)"),
        ([(10, 12)], r"give --resolution 16 --upscale"),
        ([(2000, 1500)], r"give --resolution 1024 \(cropped"),
        ([(32, 64)], r"give --resolution 32 \(cropped"),
    ],
)
def test_images_without_a_common_size_are_told_what_to_give(
    sizes: list[tuple[int, int]], told: str, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, (height, width) in enumerate(sizes):
        (pictures / f"{number}.png").write_bytes(encode_png(np.zeros((height, width, 3), np.uint8)))
    with pytest.raises(UserError, match=told):
        pack(open_source(str(pictures)), str(tmp_path / "shards"), workers=1, progress=False)


def test_images_of_one_size_are_packed_at_it_and_grey_stays_grey(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    made = pack(ArraySource(pixels), str(tmp_path), workers=1, progress=False)
    assert (made.resolution, made.channels, made.classes) == (64, 1, None)
    assert made == read_manifest(str(tmp_path))
    for shard in made.shards:
        assert shard.labels is None
        data = (tmp_path / shard.name).read_bytes()
        for key, offset, size in zip(shard.keys, shard.offsets, shard.sizes, strict=True):
            stored = Image.open(io.BytesIO(data[offset : offset + size]))
            assert stored.mode == "L"
            assert np.array_equal(np.asarray(stored), pixels[int(key)])


def test_the_same_pictures_give_the_same_bytes_whatever_the_order_they_are_given_in(tmp_path: Path) -> None:
    for name, order in (("a", range(20)), ("b", reversed(range(20)))):
        (tmp_path / name).mkdir()
        for number in order:
            (tmp_path / name / f"{number:02d}.png").write_bytes(encode_png(picture(number)))
        pack(open_source(str(tmp_path / name)), str(tmp_path / f"{name}-shards"), workers=1, progress=False)
    for path in (tmp_path / "a-shards").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b-shards" / path.name).read_bytes()


# -- fetching ------------------------------------------------------------------------------------------------------------


def test_no_more_results_and_bytes_wait_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for while one is in the caller's hands, with limits small enough to count on fingers."""
    monkeypatch.setattr(fetching, "MAX_PENDING", 4)
    monkeypatch.setattr(fetching, "MAX_PENDING_BYTES", 10)
    for sizes in ([1] * 12, [3] * 12, [10] * 6, [11, 11, 1, 1, 1, 1, 1], [1, 1, 20], [2, 2, 20, 9, 1, 9, 2]):
        pulled: list[int] = []

        def items(count: int = len(sizes), pulled: list[int] = pulled) -> Iterator[int]:
            for number in range(count + 1):
                pulled.append(number)
                if number < count:
                    yield number

        for taken, (item, get) in enumerate(prefetch(lambda n: n, items(), size=sizes.__getitem__, num_threads=2)):
            assert item == taken == get()
            held = sizes[taken + 1 : pulled[-1]]  # the last one that was pulled is not asked for before there is room
            assert len(held) <= 4
            assert sum(held) <= 10 or len(held) == 1, "a larger one alone"
        assert taken == len(sizes) - 1
