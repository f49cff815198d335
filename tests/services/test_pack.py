"""From images to shards: the rules, every mistake in one sentence, and kills at any moment."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dist_gan.data.manifest import Manifest, Shard, check_shards, read_manifest, write_manifest
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.image_source import ImageSource
from dist_gan.packing.pack import pack
from dist_gan.packing.shard_writer import shard_name
from dist_gan.packing.sources import open_source
from dist_gan.pictures import decode, encode_png
from dist_gan.types import TrainingFailed, UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
QUIET = {"say": lambda sentence: None, "workers": 1}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def jpeg(side: int = 16, *, seed: int = 0, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(side, side, 3, seed=seed)).convert(mode).save(file, format="JPEG", **options)
    return file.getvalue()


def make_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    root.mkdir(exist_ok=True)
    return str(root)


def make_zip(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def classes(count: int = 5, **options: int) -> dict[str, bytes]:
    return {
        f"train/{name}/{n:03d}.jpg": jpeg(seed=100 * c + n, **options)
        for c, name in enumerate(("cat", "dog"))
        for n in range(count)
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples_of(folder: Path, manifest: Manifest) -> list[dict[str, bytes]]:
    urls = [str(folder / shard.name) for shard in manifest.shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def nothing_to_train_on(folder: Path) -> bool:
    """No manifest, no shard under its name that has no index, nothing temporary."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    strays = [name for name in names if name.endswith(".tmp")]
    shards = [name for name in names if name.endswith(".tar") and f".{name[:-4]}.json" not in names]
    return "manifest.json" not in names and not strays and not shards


# What comes out


def test_plain_webdataset_reads_every_sample_back_with_its_own_bytes_and_label(tmp_path: Path) -> None:
    files = classes()
    manifest = pack(
        open_source(make_folder(tmp_path / "in", files)), str(tmp_path / "out"), samples_per_shard=4, **QUIET
    )
    assert (manifest.resolution, manifest.channels, manifest.classes) == (16, 3, ("cat", "dog"))
    assert manifest.class_counts == (5, 5)
    assert [len(shard.keys) for shard in manifest.shards] == [4, 4, 2]
    found = {s["__key__"]: (s["jpg"], s["cls"]) for s in samples_of(tmp_path / "out", manifest)}
    assert found == {name[6:-4]: (data, b"0" if "/cat/" in name else b"1") for name, data in files.items()}
    assert sorted(contents(tmp_path / "out")) == ["manifest.json", *(shard_name(n) for n in range(3))]


def test_offsets_and_labels_of_the_manifest_point_at_the_images(tmp_path: Path) -> None:
    source = open_source(make_zip(tmp_path / "in.zip", classes()))
    written = pack(source, str(tmp_path / "out"), samples_per_shard=4, **QUIET)
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest == written
    assert manifest.fingerprint == written.fingerprint
    reader = source.reader
    labels = {entry.key: entry.label for entry in source.entries}
    members = {entry.key: entry for entry in source.entries}
    for shard in manifest.shards:
        data = (tmp_path / "out" / shard.name).read_bytes()
        assert len(data) == shard.bytes
        assert shard.labels is not None
        for key, offset, size, label in zip(shard.keys, shard.offsets, shard.sizes, shard.labels, strict=True):
            with reader.open(members[key]) as file:
                assert data[offset : offset + size] == file.read()
            assert label == labels[key]


def test_shards_are_not_sorted_by_class(tmp_path: Path) -> None:
    source = ArraySource(noise(200, 16, 16, 1), np.arange(200) // 100, class_names=("a", "b"))
    manifest = pack(source, str(tmp_path / "out"), samples_per_shard=50, **QUIET)
    for shard in manifest.shards:
        assert 10 < sum(shard.labels or ()) < 40


def test_one_and_two_workers_give_the_same_bytes(tmp_path: Path) -> None:
    source = ArraySource(noise(90, 20, 20, 3), np.arange(90) % 3)
    for workers in (1, 2):
        pack(source, str(tmp_path / str(workers)), samples_per_shard=20, workers=workers, resolution=16, say=print)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_pictures_that_do_not_fit_are_made_to_fit_and_written_as_png(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = io.BytesIO()
    Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(sixteen, format="PNG")
    files = {
        "plain.jpg": jpeg(),
        "large.jpg": jpeg(40),
        "grey.jpg": jpeg(mode="L"),
        "cmyk.jpg": jpeg(mode="CMYK"),
        "turned.jpg": jpeg(exif=exif.tobytes()),
        "sixteen.png": sixteen.getvalue(),
    }
    source = open_source(make_folder(tmp_path / "in", files))
    manifest = pack(source, str(tmp_path / "out"), resolution=16, channels=3, **QUIET)
    assert manifest.classes is None
    found = {sample["__key__"]: sample for sample in samples_of(tmp_path / "out", manifest)}
    assert found["plain"]["jpg"] == files["plain.jpg"]
    for key in found.keys() - {"plain"}:
        assert decode(found[key]["png"], name=key).shape == (16, 16, 3)
    assert decode(found["sixteen"]["png"], name="").min() == 255
    upright = np.rot90(decode(jpeg(), name=""), -1)
    assert np.array_equal(decode(found["turned"]["png"], name=""), upright)
    assert all("cls" not in sample for sample in found.values())


def test_labels_can_be_left_out(tmp_path: Path) -> None:
    source = open_source(make_folder(tmp_path / "in", classes()))
    manifest = pack(source, str(tmp_path / "out"), labels=False, **QUIET)
    assert manifest.classes is None
    assert all(shard.labels is None for shard in manifest.shards)
    assert all("cls" not in sample for sample in samples_of(tmp_path / "out", manifest))


def test_long_and_foreign_names_survive(tmp_path: Path) -> None:
    names = [f"{'a' * 90}/{'b' * 90}/{'c' * 90}", "größe/図", "dots.in.folder/x"]
    files = {f"{name}.jpg": jpeg(seed=n) for n, name in enumerate(names)}
    manifest = pack(open_source(make_zip(tmp_path / "in.zip", files)), str(tmp_path / "out"), **QUIET)
    assert {sample["__key__"] for sample in samples_of(tmp_path / "out", manifest)} == set(names)
    assert set(manifest.shards[0].keys) == set(names)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not beside this checkout")
def test_real_images_are_packed(tmp_path: Path) -> None:
    with np.load(SHARED / "mnist-test.npz") as arrays:
        np.savez(tmp_path / "mnist.npz", images=arrays["images"][::50], labels=arrays["labels"][::50])
        first, labels = arrays["images"][0], arrays["labels"][::50]
    manifest = pack(open_source(str(tmp_path / "mnist.npz")), str(tmp_path / "m"), resolution=32, pad=True, **QUIET)
    assert (manifest.resolution, manifest.channels) == (32, 1)
    assert manifest.class_counts == tuple(np.bincount(labels, minlength=10))
    found = {sample["__key__"]: sample for sample in samples_of(tmp_path / "m", manifest)}
    assert np.array_equal(decode(found["00000000"]["png"], name="")[2:30, 2:30, 0], first)
    with zipfile.ZipFile(SHARED / "cifar10-train.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][::500]
        small = make_zip(tmp_path / "cifar.zip", {name: archive.read(name) for name in names})
    manifest = pack(open_source(small), str(tmp_path / "c"), **QUIET)
    assert (manifest.resolution, manifest.channels, manifest.class_counts) == (32, 3, (10,) * 10)
    assert set(manifest.shards[0].extensions) == {"jpg"}


# Where images come from


def test_a_stylegan_zip_gives_its_labels(tmp_path: Path) -> None:
    images = {f"00000/img{n:08d}.png": encode_png(noise(16, 16, 3, seed=n)) for n in range(4)}
    labels = {"labels": [[name, 2 * (n % 2)] for n, name in enumerate(images)]}
    source = open_source(make_zip(tmp_path / "a.zip", {**images, "dataset.json": json.dumps(labels).encode()}))
    assert source.classes == ("0", "1", "2")
    assert [entry.label for entry in source.entries] == [0, 2, 0, 2]
    assert [entry.key for entry in source.entries] == [name[:-4] for name in images]
    source = open_source(make_zip(tmp_path / "b.zip", {**images, "dataset.json": b'{"labels": null}'}))
    assert source.classes is None


def test_hidden_and_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    files = {**classes(), "train/notes.txt": b"x", "train/cat/readme.md": b"x", "train/.hidden.jpg": b"x"}
    files |= {"train/cat/Thumbs.db": b"x", ".git/a.jpg": b"x", "__MACOSX/train/cat/._001.jpg": b"x"}
    for path in (make_folder(tmp_path / "in", files), make_zip(tmp_path / "in.zip", files)):
        source = open_source(path)
        assert len(source.entries) == 10
        assert source.classes == ("cat", "dog")
        assert "passed over 6 files: not an image type that is read: " in source.notes[0]
        assert "1 .md" in source.notes[0]
        assert "hidden files: 4 (" in source.notes[0]


def test_a_source_lists_the_same_whatever_the_order_of_its_files(tmp_path: Path) -> None:
    files = classes()
    one = open_source(make_zip(tmp_path / "1.zip", files))
    two = open_source(make_zip(tmp_path / "2.zip", dict(reversed(files.items()))))
    assert one.entries == two.entries
    assert open_source(make_folder(tmp_path / "in", files)).entries == one.entries


def saved_npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def damaged_zip(path: Path) -> str:
    make_zip(path, classes())
    path.write_bytes(path.read_bytes()[:-30])
    return str(path)


def with_empty_folder(path: Path) -> str:
    make_folder(path, classes())
    (path / "train" / "emu").mkdir()
    return str(path)


def stylegan(path: Path, labels: object) -> str:
    images = {f"0/{n}.png": encode_png(noise(16, 16, 3)) for n in range(2)}
    return make_zip(path, {**images, "dataset.json": json.dumps({"labels": labels}).encode()})


IMAGES = noise(3, 16, 16)
BAD_SOURCES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "absent": (lambda p: str(p / "none"), ["none", "not there", "give a folder"]),
    "kind": (lambda p: make_zip(p / "a.rar", {}), ["a.rar", "cannot be packed", ".zip"]),
    "remote": (lambda p: "s3://bucket/x.zip", ["s3://bucket/x.zip", "local files only", "copy them"]),
    "no images": (lambda p: make_folder(p / "in", {"a.txt": b""}), ["in", "no images", "1 .txt", ".jpg"]),
    "no images in zip": (lambda p: make_zip(p / "a.zip", {}), ["a.zip", "no images"]),
    "empty class": (lambda p: with_empty_folder(p / "in"), ["'emu' holds no image", "remove it"]),
    "empty class in zip": (lambda p: make_zip(p / "a.zip", {**classes(), "train/emu/": b""}), ["'emu' holds no image"]),
    "loose": (
        lambda p: make_folder(p / "in", {**classes(), "train/x.jpg": b""}),
        ["1 images lie beside", "'x.jpg'", "move them"],
    ),
    "splits": (
        lambda p: make_folder(p / "in", {"train/1.jpg": b"", "val/1.jpg": b""}),
        ["'train', 'val'", "pack each of them"],
    ),
    "two names": (
        lambda p: make_folder(p / "in", {"a.png": b"", "a.jpg": b""}),
        ["'a.jpg' and 'a.png'", "key 'a'", "rename"],
    ),
    "dots": (lambda p: make_folder(p / "in", {"a.b.png": b"", "a_b.png": b""}), ["'a.b.png' and 'a_b.png'", "rename"]),
    "skipped name": (
        lambda p: make_folder(p / "in", {"a/1.jpg": b"", "__b__/1.jpg": b""}),
        ["'__b__/1.jpg'", "rename"],
    ),
    "leaves": (lambda p: make_zip(p / "a.zip", {"a/1.jpg": b"", "../2.jpg": b""}), ["'../2.jpg'", "leaves the folder"]),
    "damaged zip": (lambda p: damaged_zip(p / "a.zip"), ["a.zip", "not a whole zip", "copy it again"]),
    "missing label": (lambda p: stylegan(p / "a.zip", [["0/0.png", 1]]), ["no label for 1 of 2", "'0/1.png'", "null"]),
    "absent image": (
        lambda p: stylegan(p / "a.zip", [["0/0.png", 1], ["0/1.png", 1], ["0/9.png", 1]]),
        ["1 images that are not there", "'0/9.png'"],
    ),
    "vector label": (lambda p: stylegan(p / "a.zip", [["0/0.png", [0.5]]]), ["'0/0.png' is [0.5]", "whole number"]),
    "label shape": (lambda p: stylegan(p / "a.zip", {"0/0.png": 1}), ["dataset.json", "must be"]),
    "npz name": (lambda p: saved_npz(p / "a.npz", x=IMAGES), ["a.npz", "no array 'images'", "found: x", "rename"]),
    "npz type": (lambda p: saved_npz(p / "a.npz", images=IMAGES / 255.0), ["float64", "must be uint8"]),
    "npz shape": (lambda p: saved_npz(p / "a.npz", images=IMAGES[0]), ["(16, 16)", "(N, H, W)"]),
    "npz order": (
        lambda p: saved_npz(p / "a.npz", images=noise(2, 3, 16, 16)),
        ["(2, 3, 16, 16)", "channels come last"],
    ),
    "npz none": (lambda p: saved_npz(p / "a.npz", images=IMAGES[:0]), ["(0, 16, 16)", "no images"]),
    "npz labels": (lambda p: saved_npz(p / "a.npz", images=IMAGES, labels=np.arange(2)), ["(2,)", "each of the 3"]),
    "npz negative": (lambda p: saved_npz(p / "a.npz", images=IMAGES, labels=np.arange(3) - 1), ["from -1 to 1"]),
    "npz pickle": (lambda p: saved_npz(p / "a.npz", images=np.array([{}, 1], object)), ["a.npz", "plain numbers"]),
    "npz damaged": (lambda p: make_folder(p, {"a.npz": b"PK\3\4 no"}) + "/a.npz", ["a.npz", "not a whole npz"]),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_refused_with_place_value_and_remedy(case: str, tmp_path: Path) -> None:
    make, parts = BAD_SOURCES[case]
    path = make(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(path)
    for part in parts:
        assert part in str(caught.value)


def test_mistakes_of_a_source_are_told_together_up_to_ten(tmp_path: Path) -> None:
    files = {f"{n:02d}.{extension}": b"" for n in range(14) for extension in ("jpg", "png")}
    with pytest.raises(UserError) as caught:
        open_source(make_folder(tmp_path / "in", files))
    assert "14 mistakes" in str(caught.value)
    assert str(caught.value).count("would both have the key") == 10
    assert "and 4 more" in str(caught.value)


# What is refused before and while packing


def test_bad_options_are_refused(tmp_path: Path) -> None:
    source = ArraySource(IMAGES)
    cases: list[tuple[dict[str, object], str]] = [
        ({"resolution": 24}, "resolution: 24 is not a power of two"),
        ({"resolution": 8}, "16 to 1024"),
        ({"channels": 2}, "channels: 2"),
        ({"samples_per_shard": 0}, "samples_per_shard: 0"),
        ({"workers": 0}, "workers: 0"),
        ({"pad": True, "upscale": True}, "exclude each other"),
    ]
    for options, words in cases:
        with pytest.raises(UserError, match=words):
            pack(source, str(tmp_path / "out"), **{**QUIET, **options})
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((5, 28, 28, 1), ["28x28 (5)", "--resolution 32 --pad", "--resolution 16"]),
        ((5, 20, 70, 3), ["70x20 (5)", "--resolution 16"]),
        ((5, 8, 8, 1), ["8x8 (5)", "--resolution 16 --upscale"]),
    ],
)
def test_without_a_resolution_odd_sizes_are_refused_with_what_to_give(
    shape: tuple[int, ...], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        pack(ArraySource(noise(*shape)), str(tmp_path / "out"), **QUIET)
    for word in words:
        assert word in str(caught.value)
    assert nothing_to_train_on(tmp_path / "out")


def test_mixed_sizes_and_mixed_channels_are_refused(tmp_path: Path) -> None:
    source = open_source(make_folder(tmp_path / "sizes", {"a.jpg": jpeg(16), "b.jpg": jpeg(32), "c.jpg": jpeg(32)}))
    with pytest.raises(UserError, match=r"found 32x32 \(2\), 16x16 \(1\); give --resolution 16"):
        pack(source, str(tmp_path / "out"), **QUIET)
    source = open_source(make_folder(tmp_path / "modes", {"a.jpg": jpeg(), "b.jpg": jpeg(mode="L")}))
    with pytest.raises(UserError, match="found 1 grey and 1 RGB images; give --channels 3"):
        pack(source, str(tmp_path / "out"), **QUIET)
    assert pack(source, str(tmp_path / "out"), channels=1, **QUIET).channels == 1


def bad_images() -> dict[str, bytes]:
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, format="PNG")
    return {
        "bad/bomb.png": bomb.getvalue(),
        "bad/cut.jpg": jpeg()[:400],
        "bad/empty.png": b"",
        "bad/pixel.png": encode_png(noise(1, 1, 3)),
        "bad/text.jpg": b"not found",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_stop_the_pack_and_are_listed_together(workers: int, tmp_path: Path) -> None:
    source = open_source(make_zip(tmp_path / "in.zip", {**classes(20), **bad_images()}))
    options = {**QUIET, "workers": workers, "resolution": 16, "channels": 3, "samples_per_shard": 45}
    with pytest.raises(UserError) as caught:
        pack(source, str(tmp_path / "out"), **options)
    words = ["9000x9000 is more than", "cut.jpg: cannot be decoded", "empty.png: ", "pixel.png: 1x1 is smaller"]
    for word in [*words, "text.jpg: not a picture", "--skip-bad"]:
        assert word in str(caught.value)
    assert nothing_to_train_on(tmp_path / "out")


def test_with_skip_bad_the_rest_is_packed_and_the_bad_ones_are_listed(tmp_path: Path) -> None:
    source = open_source(make_zip(tmp_path / "in.zip", {**classes(20), **bad_images()}))
    options = {"resolution": 16, "samples_per_shard": 3, "workers": 1}
    with pytest.raises(UserError, match="--skip-bad"):
        pack(source, str(tmp_path / "out"), channels=3, **options)
    said: list[str] = []
    manifest = pack(source, str(tmp_path / "out"), channels=3, skip_bad=True, say=said.append, **options)
    assert manifest.num_samples == 40
    assert "left out 5 bad images" in said[-1]
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == sorted(bad_images())
    assert len(samples_of(tmp_path / "out", manifest)) == 40
    pack(source, str(tmp_path / "again"), channels=3, skip_bad=True, say=print, **options)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_if_nothing_but_bad_images_is_left_there_is_no_manifest(tmp_path: Path) -> None:
    unreadable = {name: data for name, data in bad_images().items() if name != "bad/pixel.png"}
    source = open_source(make_zip(tmp_path / "in.zip", unreadable))
    for options in ({}, {"resolution": 16, "channels": 3}):
        with pytest.raises(UserError, match="cannot be packed"):
            pack(source, str(tmp_path / "out"), skip_bad=True, **QUIET, **options)
        assert nothing_to_train_on(tmp_path / "out")


def test_a_damaged_member_of_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "in.zip"
    files = classes()
    make_zip(path, files)
    data = bytearray(path.read_bytes())
    data[data.index(files["train/cat/002.jpg"]) + 300] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train/cat/002.jpg: cannot be (read|decoded) \(Bad CRC-32"):
        pack(open_source(str(path)), str(tmp_path / "out"), **QUIET)
    assert nothing_to_train_on(tmp_path / "out")


# The destination


def test_a_finished_pack_is_recognised_and_another_one_is_refused(tmp_path: Path) -> None:
    source, out = ArraySource(noise(10, 16, 16)), str(tmp_path / "out")
    said: list[str] = []
    first = pack(source, out, **QUIET)
    before = contents(tmp_path / "out")
    assert pack(source, out, workers=1, say=said.append) == first
    assert "already packed: 10 images in 1 shards" in said[0]
    for other, options in ((ArraySource(noise(10, 16, 16, seed=1)), {}), (source, {"channels": 3})):
        with pytest.raises(UserError, match="holds 10 images from another pack.*choose another folder"):
            pack(other, out, **QUIET, **options)
    assert contents(tmp_path / "out") == before
    shard = tmp_path / "out" / first.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match="the manifest says 20,480 bytes, the file has 19,968"):
        pack(source, out, **QUIET)


def test_what_a_kill_after_the_manifest_left_is_cleaned(tmp_path: Path) -> None:
    source, out = ArraySource(noise(10, 16, 16)), tmp_path / "out"
    pack(source, str(out), **QUIET)
    before = contents(out)
    for name in (".pack-plan.json", ".shard-00000.json", ".shard-00000.tar.0a.tmp", ".manifest.json.0a.tmp"):
        (out / name).write_bytes(b"{}")
    pack(source, str(out), **QUIET)
    assert contents(out) == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", {"thesis.pdf": b"precious"})
    with pytest.raises(UserError, match=r"is not empty \(thesis.pdf\).*choose another folder"):
        pack(ArraySource(IMAGES), str(tmp_path / "out"), **QUIET)
    assert contents(tmp_path / "out") == {"thesis.pdf": b"precious"}
    make_folder(tmp_path / "in", classes())
    with pytest.raises(UserError, match=r"lies inside the source.*outside"):
        pack(open_source(str(tmp_path / "in")), str(tmp_path / "in" / "out"), **QUIET)
    with pytest.raises(UserError, match=r"https://host/x: an HTTP server takes no files; give a local folder or a"):
        pack(ArraySource(IMAGES), "https://host/x", **QUIET)


def test_an_unfinished_pack_of_something_else_is_refused(tmp_path: Path) -> None:
    source = open_source(make_zip(tmp_path / "in.zip", {**classes(), "train/cat/x.jpg": b"bad"}))
    with pytest.raises(UserError, match="cannot be packed"):
        pack(source, str(tmp_path / "out"), resolution=16, channels=3, samples_per_shard=2, **QUIET)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"unfinished pack of another source or with other options.*empty this one"):
        pack(source, str(tmp_path / "out"), resolution=16, channels=3, samples_per_shard=3, **QUIET)
    assert contents(tmp_path / "out") == before


def test_a_destination_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for dest in ("file", "file/out"):
        with pytest.raises(UserError, match=r"destination .*give another folder"):
            pack(ArraySource(IMAGES), str(tmp_path / dest), **QUIET)


@contextmanager
def as_a_mere_user() -> Iterator[None]:
    """Root may write everywhere: it steps down to `nobody` for a while."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    pack(ArraySource(IMAGES), str(tmp_path / "first"), **QUIET)  # whatever is imported late is imported now
    locked = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    locked.chmod(0o555)
    try:
        with as_a_mere_user(), pytest.raises((UserError, TrainingFailed), match="no write permission"):
            pack(ArraySource(IMAGES), str(locked), **QUIET)
        assert not list(locked.iterdir())
    finally:
        locked.rmdir()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_in_a_sentence_and_the_pack_goes_on_when_there_is_space(
    workers: int, tiny_disk: Path, tmp_path: Path
) -> None:
    source = ArraySource(noise(200, 32, 32, 3))
    options = {**QUIET, "workers": workers, "samples_per_shard": 20}
    with pytest.raises(
        TrainingFailed, match=r"cannot write .*shard-\d+\.(tar|json).*the disk is full; free some space"
    ):
        pack(source, str(tiny_disk / "out"), **options)
    assert nothing_to_train_on(tiny_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)
    said: list[str] = []
    pack(source, str(tiny_disk / "out"), **{**options, "say": said.append})
    assert "going on: " in said[0]
    pack(source, str(tmp_path / "whole"), **{**options, "workers": 1})
    assert contents(tiny_disk / "out") == contents(tmp_path / "whole")


def test_a_read_only_disk_is_told_in_a_sentence(tiny_disk: Path) -> None:
    (tiny_disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(TrainingFailed, match=r"\.pack-plan\.json.*no write permission; choose a folder"):
        pack(ArraySource(IMAGES), str(tiny_disk / "out"), **QUIET)
    with pytest.raises(UserError, match=r"new: cannot be made: no write permission"):
        pack(ArraySource(IMAGES), str(tiny_disk / "new"), **QUIET)


def test_a_limit_on_file_sizes_is_told_in_a_sentence(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, old[1]))
    try:
        with pytest.raises(TrainingFailed, match=r"cannot write .*shard-00000.tar: File too large"):
            pack(ArraySource(noise(50, 32, 32, 3)), str(tmp_path / "out"), **QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert nothing_to_train_on(tmp_path / "out")


# Kills


SCRIPT = """
import sys
import tempfile
from dist_gan.packing.pack import pack
from dist_gan.packing.image_source import ImageSource
from dist_gan.packing.sources import open_source
if __name__ == "__main__":
    pack(open_source(sys.argv[1]), sys.argv[2], resolution=32, samples_per_shard=10, workers=int(sys.argv[3]))
"""


def start_pack(tmp_path: Path, source: str, out: Path, *, workers: int) -> subprocess.Popen[bytes]:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "script.py"), source, str(out), str(workers)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(workers: int, tmp_path: Path) -> None:
    source, out = saved_npz(tmp_path / "a.npz", images=noise(600, 96, 96, 3)), tmp_path / "out"
    process = start_pack(tmp_path, source, out, workers=workers)
    until = time.monotonic() + 60
    while len(list(out.glob("shard-*.tar"))) < 5 and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # Workers leave with their parent; nothing may change under the feet of what follows.
    time.sleep(0.5)
    kept = {path.name: path.stat().st_ino for path in out.glob("shard-*.tar")}
    whole = {name for name in kept if (out / f".{name[:-4]}.json").exists()}
    assert 5 <= len(whole) < 60, "the kill came too early or too late to prove anything"
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match=r"no manifest.json there; run `dist-gan pack`"):
        read_manifest(str(out))
    (out / ".shard-00055.tar.0123abcd.tmp").write_bytes(b"half")
    pack(open_source(source), str(out), resolution=32, samples_per_shard=10, **QUIET)
    assert {name: (out / name).stat().st_ino for name in whole} == {name: kept[name] for name in whole}
    pack(open_source(source), str(tmp_path / "once"), resolution=32, samples_per_shard=10, **QUIET)
    assert contents(out) == contents(tmp_path / "once")


def test_a_worker_that_dies_ends_the_pack_with_a_sentence(tmp_path: Path) -> None:
    source = ArraySource(noise(40, 16, 16))
    source.reader = DeadlyReader()
    with pytest.raises(TrainingFailed, match=r"died \(exit code -9; .*start the same command again"):
        pack(source, str(tmp_path / "out"), samples_per_shard=10, **{**QUIET, "workers": 2})
    assert nothing_to_train_on(tmp_path / "out")


class DeadlyReader:
    """Kills the process that reads the image 00000007."""

    def open(self, entry: object) -> np.ndarray:
        if getattr(entry, "key", "") == "00000007":
            os.kill(os.getpid(), signal.SIGKILL)
        return noise(16, 16, 1)


def test_two_packs_do_not_share_a_folder(tmp_path: Path) -> None:
    said: list[str] = []

    def second(sentence: str) -> None:
        said.append(sentence)
        with pytest.raises(UserError, match="another pack is at work there"):
            pack(source, str(tmp_path / "out"), resolution=16, skip_bad=True, **QUIET)

    source: ImageSource = open_source(make_zip(tmp_path / "in.zip", {**classes(), "train/cat/x.jpg": b"bad"}))
    pack(source, str(tmp_path / "out"), resolution=16, skip_bad=True, workers=1, say=second)
    assert "left out 1 bad" in said[0]


# The manifest


def small_manifest() -> Manifest:
    shard = Shard("a.tar", 4096, "0" * 64, ("x", "y"), (512, 1536), (100, 200), ("jpg", "png"), (0, 1))
    return Manifest(16, 3, ("cat", "dog"), (shard,), "test")


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = small_manifest()
    write_manifest(str(tmp_path), manifest)
    assert read_manifest(str(tmp_path)) == manifest
    assert manifest.num_samples == 2
    assert manifest.class_counts == (1, 1)
    memory = f"memory://{tmp_path.name}"
    write_manifest(memory, manifest)
    assert read_manifest(memory).fingerprint == manifest.fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_the_origin() -> None:
    manifest = small_manifest()
    assert Manifest(16, 3, ("cat", "dog"), manifest.shards, "elsewhere").fingerprint == manifest.fingerprint
    assert Manifest(16, 3, ("dog", "cat"), manifest.shards, "test").fingerprint != manifest.fingerprint


BAD_MANIFESTS: dict[str, tuple[dict[str, object], str]] = {
    "format": ({"format": "other"}, "the format is 'other'"),
    "version": ({"version": 2}, "version 2, and this program reads version 1"),
    "resolution": ({"resolution": -3}, "resolution is -3"),
    "channels": ({"channels": 4}, "channels is 4"),
    "classes": ({"classes": [1, 2]}, "classes is neither"),
    "few classes": ({"classes": ["cat"]}, "the label 1, and there are 1 classes"),
    "no classes": ({"classes": None}, "'a.tar' has labels, which contradicts"),
    "no shards": ({"shards": []}, "lists no shards"),
    "no object": ({"shards": [3]}, "shard 0 is no JSON object"),
    "parent": ({"name": "../a.tar"}, "'../a.tar', which is not a plain file name"),
    "absolute": ({"name": "/a.tar"}, "not a plain file name"),
    "url": ({"name": "s3://b/a.tar"}, "not a plain file name"),
    "windows": ({"name": "..\\a.tar"}, "not a plain file name"),
    "bytes": ({"bytes": True}, "has True bytes"),
    "sha256": ({"sha256": "ff"}, "sha256 'ff'"),
    "keys": ({"keys": "xy"}, "no list of keys"),
    "key": ({"keys": ["x", 3]}, "no list of keys"),
    "twice": ({"keys": ["x", "x"]}, "the key 'x' appears 2 times"),
    "lengths": ({"sizes": [100]}, "columns of different lengths"),
    "negative": ({"offsets": [-1, 1536]}, "offsets holds -1"),
    "floats": ({"offsets": [1.5, 1536]}, "offsets is not a list of whole numbers"),
    "huge": ({"offsets": [512, 2**70]}, "offsets is not a list of whole numbers"),
    "wrap": ({"offsets": [512, 2**63 - 1], "sizes": [100, 200]}, "'y' would lie outside"),
    "outside": ({"sizes": [100, 4000]}, "'y' would lie outside the file of 4,096"),
    "overlap": ({"sizes": [1025, 200]}, "'x' and 'y' overlap"),
    "labels": ({"labels": [0]}, "columns of different lengths"),
    "label": ({"labels": [0, -1]}, "labels holds -1"),
    "extensions": ({"extensions": [1, 2]}, "extensions that are no names"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    changes, words = BAD_MANIFESTS[case]
    write_manifest(str(tmp_path), small_manifest())
    content = json.loads((tmp_path / "manifest.json").read_text())
    for name, value in changes.items():
        (content if name in content else content["shards"][0])[name] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_manifest(str(tmp_path))
    assert words in str(caught.value)
    assert "manifest.json" in str(caught.value)
    assert "dist-gan" in str(caught.value), "there is no remedy"


def test_no_manifest_and_no_json_are_refused(tmp_path: Path) -> None:
    for url in (str(tmp_path), str(tmp_path / "none"), "memory://nowhere"):
        with pytest.raises(UserError, match=r"no manifest.json there; run `dist-gan pack`.*`dist-gan index`"):
            read_manifest(url)
    (tmp_path / "manifest.json").write_bytes(b'{"format": "dist_gan.sha')
    with pytest.raises(UserError, match="is not JSON"):
        read_manifest(str(tmp_path))


def test_shards_of_another_size_or_absent_are_refused(tmp_path: Path) -> None:
    manifest = small_manifest()
    with pytest.raises(UserError, match=r"a.tar: the manifest says 4,096 bytes, it is not there.*another data set"):
        check_shards(str(tmp_path), manifest)
    (tmp_path / "a.tar").write_bytes(bytes(4095))
    with pytest.raises(UserError, match="says 4,096 bytes, the file has 4,095"):
        check_shards(str(tmp_path), manifest)
    (tmp_path / "a.tar").write_bytes(bytes(4096))
    check_shards(str(tmp_path), manifest)


def test_a_manifest_of_a_million_samples_is_read_in_seconds(tmp_path: Path) -> None:
    number = 4000
    shards = tuple(
        Shard(
            name=f"{n}.tar",
            bytes=2048 * number,
            sha256="0" * 64,
            keys=tuple(f"n{n:08d}/n{n:08d}_{row}" for row in range(number)),
            offsets=tuple(range(512, 2048 * number, 2048)),
            sizes=(1000,) * number,
            extensions=("jpg",) * number,
            labels=(n,) * number,
        )
        for n in range(250)
    )
    write_manifest(str(tmp_path), Manifest(64, 3, tuple(map(str, range(250))), shards, ""))
    start = time.process_time()
    assert read_manifest(str(tmp_path)).num_samples == 1_000_000
    assert time.process_time() - start < 8
