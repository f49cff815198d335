"""Shards that others wrote get a manifest or are refused; damage that webdataset passes over in silence is found."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset.writer import ShardWriter

from dist_gan import storage
from dist_gan.data.manifest import Manifest, read_manifest
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.indexing import index, verify
from dist_gan.packing.pack import pack
from dist_gan.packing.tar_scan import DamagedTar, TarScan
from dist_gan.pictures import encode_png
from dist_gan.types import UserError

QUIET = {"say": lambda sentence: None, "workers": 1}
PNG = encode_png(np.full((16, 16, 3), 7, np.uint8))
GREY = encode_png(np.full((16, 16, 1), 7, np.uint8))
LARGE = encode_png(np.zeros((32, 40, 3), np.uint8))

Members = list[tuple[str, bytes]]


def make_tar(path: Path, members: Members, *, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(count: int = 10) -> Members:
    return [m for n in range(count) for m in ((f"{n:03d}.png", PNG), (f"{n:03d}.cls", str(n % 3).encode()))]


def scan(path: Path) -> list[tuple[str, int, int]]:
    with open(path, "rb") as file:
        return [(m.name, m.offset, m.size) for m in TarScan(file, size=path.stat().st_size, place=path.name)]


def seen_by_webdataset(path: Path) -> int:
    return len(list(webdataset.WebDataset(str(path), shardshuffle=False)))


# The strict scan


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_scan_agrees_with_tarfile_on_whole_archives(format: int, tmp_path: Path) -> None:
    long = "a" * 80 + "/" + "b" * 90 if format == tarfile.USTAR_FORMAT else "a" * 120 + "/" + "b" * 180
    members = [("x.png", PNG), (f"{long}.png", b""), ("größe/図.cls", b"1"), ("512.bin", bytes(512)), ("z.bin", b"z")]
    path = make_tar(tmp_path / "a.tar", members, format=format)
    with tarfile.open(path) as tar:
        assert scan(path) == [(m.name, m.offset_data, m.size) for m in tar.getmembers()]


def test_the_scan_passes_folders_and_reads_sizes_beyond_octal(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        folder = tarfile.TarInfo("cats")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("cats/1.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    data = bytearray(path.read_bytes())
    header = bytearray(data[512:1024])
    header[124:136] = b"\x80" + len(PNG).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    data[512:1024] = header
    path.write_bytes(data)
    assert scan(path) == [("cats/1.png", 1024, len(PNG))]


HALF = 20 * 1024 // 2
"""Bytes before the sixth of ten samples: two members each, of a header and a block."""


def cut_at_a_sample(data: bytes) -> bytes:
    return data[:HALF]


def cut_in_a_header(data: bytes) -> bytes:
    return data[: HALF + 100]


def cut_in_an_image(data: bytes) -> bytes:
    return data[: HALF + 512 + 20]


def bad_header_byte(data: bytes) -> bytes:
    place = HALF + 110
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def stray_zeros(data: bytes) -> bytes:
    return data[:HALF] + bytes(1024) + data[HALF:]


def one_stray_zero_block(data: bytes) -> bytes:
    return data[:HALF] + bytes(512) + data[HALF:]


def no_end(data: bytes) -> bytes:
    return data.rstrip(b"\0").ljust(20 * 1024, b"\0")


def one_block_of_end(data: bytes) -> bytes:
    return no_end(data) + bytes(512)


def data_behind_the_end(data: bytes) -> bytes:
    return data + data


DAMAGES: dict[Callable[[bytes], bytes], str] = {
    cut_at_a_sample: "at byte 10,240: nothing where a header was expected; the archive was cut off",
    cut_in_a_header: "at byte 10,240: only 100 of the 512 bytes of a header",
    cut_in_an_image: "at byte 10,240: .* bytes of a file of .* are missing",
    bad_header_byte: "at byte 10,240: the checksum of a header is wrong",
    stray_zeros: r"at byte 10,240: a block of zeros with more data behind it \(from byte 11,264\)",
    one_stray_zero_block: r"at byte 10,240: a block of zeros with more data behind it \(from byte 10,752\)",
    no_end: "at byte 20,480: nothing where a header was expected; the archive was cut off or its end marker",
    one_block_of_end: "at byte 20,480: one block of zeros at the end instead of two",
    data_behind_the_end: r"at byte 20,480: a block of zeros with more data behind it",
}
SILENT = (cut_at_a_sample, cut_in_a_header, bad_header_byte, stray_zeros, one_stray_zero_block)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_refused_with_its_place_by_scan_and_index(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = make_tar(tmp_path / "a.tar", labelled())
    assert len(PNG) <= 512, "each member must take one header and one block"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedTar, match=f"^a.tar {DAMAGES[damage]}"):
        scan(path)
    with pytest.raises(UserError, match=f"a.tar {DAMAGES[damage]}") as caught:
        index(str(tmp_path), **QUIET)
    assert "Write or copy the damaged shards again" in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("damage", SILENT)
def test_on_the_same_tar_webdataset_loses_samples_and_says_nothing(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = make_tar(tmp_path / "a.tar", labelled())
    assert seen_by_webdataset(path) == 10
    path.write_bytes(damage(path.read_bytes()))
    assert seen_by_webdataset(path) < 10


def test_links_and_packed_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"a.tar at byte 0: '2.png' is a symbolic link; only regular files"):
        index(str(tmp_path), **QUIET)
    path.write_bytes(gzip.compress(make_tar(path, labelled()).read_bytes()))
    with pytest.raises(UserError, match=r"a.tar at byte 0: this is a gzip file, not a plain tar; unpack it"):
        index(str(tmp_path), **QUIET)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"a.tar at byte 0: nothing where a header was expected"):
        index(str(tmp_path), **QUIET)


# Index


def test_shards_of_webdatasets_own_writer_are_indexed_and_stay_as_they_are(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write({"__key__": f"k{n}", "png": PNG, "cls": n % 3, "txt": "a cat"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    manifest = index(str(tmp_path), workers=2, say=print)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert read_manifest(str(tmp_path)) == manifest
    assert (manifest.resolution, manifest.channels, manifest.classes) == (16, 3, ("0", "1", "2"))
    assert manifest.class_counts == (4, 3, 3)
    for shard in manifest.shards:
        for offset, size in zip(shard.offsets, shard.sizes, strict=True):
            assert before[shard.name][offset : offset + size] == PNG
    assert verify(str(tmp_path), workers=1) == []


def test_labels_come_from_a_key_of_the_json_when_told(tmp_path: Path) -> None:
    members = [m for n in range(4) for m in ((f"{n}.jpg", PNG), (f"{n}.json", json.dumps({"class": n}).encode()))]
    make_tar(tmp_path / "a.tar", [*members, ("0.txt", b"a caption"), ("0.cls", b"7")])
    manifest = index(str(tmp_path), label_key="class", **QUIET)
    assert manifest.shards[0].labels == (0, 1, 2, 3)
    assert verify(str(tmp_path), workers=1) == []
    with pytest.raises(UserError, match="'0': .json holds None under 'klass', not a whole number"):
        index(str(tmp_path), label_key="klass", force=True, **QUIET)


def test_a_plain_tar_of_folders_is_indexed_in_any_order_of_its_members(tmp_path: Path) -> None:
    members = [("./cat/1.png", PNG), ("./dog/2.png", GREY), ("./cat/1.cls", b"0\n"), ("./dog/2.cls", b"1")]
    make_tar(tmp_path / "a.tar", [*members, ("./README", b"x"), ("./labels.csv", b"x"), ("__meta__/1.png", b"")])
    said: list[str] = []
    manifest = index(str(tmp_path), workers=1, say=said.append)
    assert manifest.shards[0].keys == ("./cat/1", "./dog/2")
    assert manifest.shards[0].labels == (0, 1)
    assert manifest.channels == 3
    assert "passed over 3 members" in said[0]
    assert "grey ones will be read as RGB" in said[1]


def test_different_sizes_give_no_resolution(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [("1.png", PNG), ("2.png", LARGE)])
    manifest = index(str(tmp_path), **QUIET)
    assert manifest.resolution is None
    assert manifest.classes is None


def test_shards_in_another_store_are_indexed_and_verified(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    storage.publish(f"{url}/a.tar", make_tar(tmp_path / "a.tar", labelled()).read_bytes())
    assert index(url, **QUIET).shards == index(str(tmp_path), **QUIET).shards
    assert verify(url, workers=1) == []


BAD_SHARDS: dict[str, tuple[dict[str, Members], str]] = {
    "no tars": ({}, "no .tar files there; give the folder"),
    "no image": ({"a.tar": [("1.txt", b"x")]}, "a.tar: holds no image"),
    "some labels": ({"a.tar": [*labelled(2), ("9.png", PNG)]}, "a.tar: 1 of 3 images have no .cls ('9', for one)"),
    "some shards": ({"a.tar": labelled(2), "b.tar": [("9.png", PNG)]}, "b.tar has no labels, and other shards have"),
    "label": ({"a.tar": [("1.png", PNG), ("1.cls", b"cat")]}, "a.tar: '1': .cls holds b'cat', not a whole number"),
    "lonely": ({"a.tar": [*labelled(1), ("9.cls", b"1")]}, "a.tar: '9' has a .cls but no image"),
    "two images": ({"a.tar": [("1.png", PNG), ("1.jpg", PNG)]}, "a.tar: '1' has two images (.png and .jpg)"),
    "same name": ({"a.tar": [("1.png", PNG), ("1.png", PNG)]}, "'1' has two images (.png and .png)"),
    "same key": ({"a.tar": labelled(2), "b.tar": labelled(1)}, "the key '000' is in a.tar and in b.tar"),
    "bad image": ({"a.tar": [("1.png", b"<html>")]}, "a.tar: 1.png: not a picture"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_shards_that_cannot_be_trusted_are_refused(case: str, tmp_path: Path) -> None:
    shards, words = BAD_SHARDS[case]
    for name, members in shards.items():
        make_tar(tmp_path / name, members)
    with pytest.raises(UserError) as caught:
        index(str(tmp_path), **QUIET)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_mistakes_of_all_shards_are_told_together_up_to_ten(tmp_path: Path) -> None:
    for n in range(13):
        make_tar(tmp_path / f"{n:02d}.tar", [(f"{n}.png", b"bad")])
    with pytest.raises(UserError) as caught:
        index(str(tmp_path), **QUIET)
    assert str(caught.value).count("not a picture") == 10
    assert "and 3 more" in str(caught.value)


def test_a_manifest_is_not_replaced_unless_forced_and_half_a_pack_is_never_blessed(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", labelled())
    first = index(str(tmp_path), **QUIET)
    with pytest.raises(UserError, match=r"has a manifest.json already; give --force"):
        index(str(tmp_path), **QUIET)
    make_tar(tmp_path / "b.tar", [("9.png", PNG), ("9.cls", b"1")])
    assert index(str(tmp_path), force=True, **QUIET).num_samples == first.num_samples + 1
    (tmp_path / ".pack-plan.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"holds an unfinished pack; start the same `dist-gan pack` again"):
        index(str(tmp_path), force=True, **QUIET)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"'a.tar.gz' is compressed, unpack such shards first"):
        index(str(tmp_path / "gz"), **QUIET)


# Verify


def packed(folder: Path) -> Manifest:
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    return pack(ArraySource(images, np.arange(20) % 4), str(folder), samples_per_shard=10, **QUIET)


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_whole_data_set_has_no_problems_and_is_not_touched(tmp_path: Path) -> None:
    packed(tmp_path)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    assert verify(str(tmp_path), workers=1) == []
    assert verify(str(tmp_path), workers=2, decode=False) == []
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_a_flipped_bit_is_found_by_its_hash_and_by_the_image(tmp_path: Path) -> None:
    manifest = packed(tmp_path)
    shard = manifest.shards[1]
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[shard.offsets[3] + 20] ^= 255
    path.write_bytes(data)
    problems = verify(str(tmp_path), workers=1)
    assert len(problems) == 3
    assert any(f"{shard.name}: {shard.keys[3]}.png: " in problem for problem in problems)
    assert any("has the sha256" in problem and shard.sha256 in problem for problem in problems)
    assert len(verify(str(tmp_path), workers=1, decode=False)) == 2


def test_missing_cut_and_unknown_shards_are_named(tmp_path: Path) -> None:
    first, second = (tmp_path / shard.name for shard in packed(tmp_path).shards)
    os.rename(first, tmp_path / "other.tar")
    second.write_bytes(second.read_bytes()[:5000])
    problems = verify(str(tmp_path), workers=1)
    assert f"{first}: is not there" in problems
    assert any(problem.startswith(f"{second} at byte ") and "cut off" in problem for problem in problems)
    assert any("other.tar: is not in the manifest" in problem for problem in problems)


def swap_labels(content: dict) -> None:
    labels = content["shards"][0]["labels"]
    labels[0] = (labels[0] + 1) % 4


def move_image(content: dict) -> None:
    content["shards"][0]["offsets"][0] += 1
    content["shards"][0]["sizes"][0] -= 1


def rename_key(content: dict) -> None:
    content["shards"][0]["keys"][0] = "other"


def other_resolution(content: dict) -> None:
    content["resolution"] = 32


def other_channels(content: dict) -> None:
    content["channels"] = 1


@pytest.mark.parametrize(
    ("change", "words", "count"),
    [
        (swap_labels, ": .cls holds ", 1),
        (move_image, "offset, size and extension are", 1),
        (rename_key, "'other' is in the manifest and not in the tar", 2),
        (other_resolution, "is 16x16, the manifest says 32x32", 20),
        (other_channels, "has 3 channels, the manifest says 1", 20),
    ],
)
def test_a_manifest_that_differs_from_its_shards_is_found(
    change: Callable[[dict], None], words: str, count: int, tmp_path: Path
) -> None:
    packed(tmp_path)
    edit_manifest(tmp_path, change)
    problems = verify(str(tmp_path), workers=1)
    assert len(problems) == count
    assert words in problems[0]


def test_verify_without_a_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest.json there; run `dist-gan pack`"):
        verify(str(tmp_path))
