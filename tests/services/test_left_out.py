"""What a pack leaves out is counted by reason, links lead nowhere twice, and small files cannot ask for much memory."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from dist_gan import storage
from dist_gan.packing.pack import pack
from dist_gan.packing.sources import open_source
from dist_gan.pictures import EXTENSIONS, BadImage, decode, encode_png
from dist_gan.types import TrainingFailed, UserError
from tests.conftest import environment

LONGEST = os.pathconf("/", "PC_PATH_MAX")
QUIET = {"say": lambda sentence: None, "workers": 1}


def png(seed: int = 0, side: int = 16) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def saved(format: str, side: int = 16, **options: object) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=format, **options)
    return file.getvalue()


MIXED = {
    "cat/1.png": png(1), "dog/2.png": png(2), "cat/3.jfif": saved("JPEG"), "cat/4.JPE": saved("JPEG"),
    "dog/5.pjpeg": saved("JPEG"), "dog/a.tga": b"x", "dog/b.tga": b"x", "dog/c.ico": b"x", "cat/d.txt": b"x",
    "cat/README": b"x", "cat/.hidden.png": png(), "dog/Thumbs.db": b"x",
}  # fmt: skip


def make_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def make_zip(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def make_store(path: Path, files: dict[str, bytes]) -> str:
    url = f"memory://{path.parent.name}/in"
    for name, data in files.items():
        storage.publish(storage.join(url, name), data)
    return url


# -- counted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_folder, make_zip, make_store])
def test_every_file_that_is_left_out_is_counted_by_reason_at_the_end(
    make: Callable[[Path, dict[str, bytes]], str], tmp_path: Path
) -> None:
    source = open_source(make(tmp_path / "in.zip", MIXED))
    assert [entry.key for entry in source.entries] == ["cat/1", "cat/3", "cat/4", "dog/2", "dog/5"]
    said: list[str] = []
    manifest = pack(source, str(tmp_path / "out"), workers=1, say=said.append)
    assert manifest.num_samples == 5
    found = said[-1].removeprefix(f"{source.place}: ")
    kinds = sorted(found[found.index("read: ") + 6 : found.index("; hidden")].split(", "))
    assert kinds == sorted(["2 .tga", "1 .txt", "1 without an ending", "1 .ico"])
    assert found.startswith("passed over 7 files: not an image type that is read: 2 .tga")
    assert "hidden files: 2 (" in found
    again: list[str] = []
    pack(source, str(tmp_path / "out"), workers=1, say=again.append)
    assert again[-1] == said[-1], "who starts a finished pack again is told too"


@pytest.mark.parametrize(("kind", "ending"), [("JPEG", "jfif"), ("AVIF", "avif"), ("JPEG2000", "jp2")])
def test_other_endings_and_kinds_of_images_are_read_the_same_every_time(kind: str, ending: str, tmp_path: Path) -> None:
    if kind != "JPEG" and not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}[kind]):
        assert ending not in EXTENSIONS
        pytest.skip(f"this Pillow has no {kind}")
    data = saved(kind)
    source = open_source(make_folder(tmp_path / "in", {f"{n}.{ending}": data for n in range(3)}))
    assert pack(source, str(tmp_path / "out"), **QUIET).num_samples == 3
    assert all(np.array_equal(decode(data, name="x"), decode(data, name="x")) for _ in range(3))
    for end in range(0, len(data) - 40, len(data) // 20):
        with pytest.raises(BadImage):
            decode(data[:end], name="x")


@pytest.mark.parametrize("options", [{}, {"resolution": 16, "channels": 3}])
def test_bad_images_beyond_ten_are_said_to_be_more(options: dict[str, int], tmp_path: Path) -> None:
    files = {f"{n:03d}.jpg": b"bad" for n in range(47)} | {f"good{n}.png": png(n) for n in range(3)}
    source = open_source(make_folder(tmp_path / "in", files))
    with pytest.raises(UserError) as caught:
        pack(source, str(tmp_path / "out"), **QUIET, **options)
    assert str(caught.value).count("not a picture") == 10
    assert "and 37 more" in str(caught.value)
    if options:
        with pytest.raises(UserError, match=r"(more|among) .*the 20 images that were looked at"):
            pack(source, str(tmp_path / "more"), samples_per_shard=20, **QUIET, **options)


# -- links ------------------------------------------------------------------------------------------------------------


def test_a_broken_link_is_left_out_and_counted(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", {"cat/1.png": png(1), "dog/2.png": png(2)})
    (tmp_path / "in" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in" / "dog" / "self.png").symlink_to("self.png")
    (tmp_path / "in" / "cat" / "below.png").symlink_to("1.png/x")
    os.mkfifo(tmp_path / "in" / "dog" / "pipe.png")
    source = open_source(str(tmp_path / "in"))
    assert len(source.entries) == 2
    assert "passed over 4 files: broken links: 3 ('cat/below.png'); neither files nor folders: 1 (" in source.notes[0]
    assert pack(source, str(tmp_path / "out"), **QUIET).num_samples == 2


@pytest.mark.parametrize("target", ["..", ".", "../..", "../dog", "/"])
def test_a_link_back_into_the_tree_or_above_it_is_not_followed(target: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "in", {"cat/1.png": png(1), "dog/2.png": png(2)})
    (tmp_path / "in" / "cat" / "loop").symlink_to(target)
    source = open_source(str(tmp_path / "in"))
    assert [entry.key for entry in source.entries] == ["cat/1", "dog/2"]
    assert "links to folders that are read already: 1 ('cat/loop')" in source.notes[0]


def test_links_that_lead_out_of_the_tree_are_followed_once(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    make_folder(outside, {"3.png": png(3), "deep/4.png": png(4)})
    make_folder(tmp_path / "in", {"cat/1.png": png(1)})
    (outside / "back").symlink_to(outside)
    (outside / "home").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dog").symlink_to(outside)
    (tmp_path / "in" / "emu").symlink_to(outside / "deep")
    (tmp_path / "in" / "cat" / "file.png").symlink_to(outside / "3.png")
    source = open_source(str(tmp_path / "in"))
    assert [entry.key for entry in source.entries] == ["cat/1", "cat/file", "dog/3", "emu/4"]
    assert "links to folders that are read already: 3 (" in source.notes[0]
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    assert open_source(str(tmp_path / "alias")).entries == source.entries


def test_a_link_in_a_zip_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    make_zip(path, {"1.png": png()})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("2.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "1.png")
    source = open_source(str(path))
    assert len(source.entries) == 1
    assert "passed over 1 files: links: 1 ('2.png')" in source.notes[0]


def test_names_are_escaped_wherever_they_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"1.png": png(1), "2.png": png(2), "\x1b[31m.png": b"bad", "a\ndist-gan: all is well.gone": b"x"}
    source = open_source(make_folder(tmp_path / "in", files))
    pack(source, str(tmp_path / "out"), workers=1, skip_bad=True)
    said = capsys.readouterr().err + (tmp_path / "out" / "skipped.txt").read_text()
    assert "\x1b" not in said
    assert "\\x1b[31m.png" in said
    assert not any(line.startswith("dist-gan:") for line in said.splitlines())


# -- limits -----------------------------------------------------------------------------------------------------------

ODD_LABELS = {
    "huge": ("99999999", "and there are at most 1,048,576 classes"),
    "digits": ("9" * 5000, "number of thousands of digits"),
    "float": ("1.0", "not a whole number"),
    "true": ("true", "not a whole number"),
    "negative": ("-1", "not a whole number"),
    "infinite": ("1e999", "not a whole number"),
    "nested": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "text": ('"cat"', "not a whole number"),
}


@pytest.mark.parametrize("case", ODD_LABELS)
def test_an_odd_label_in_a_label_file_is_a_mistake_in_one_sentence(case: str, tmp_path: Path) -> None:
    label, words = ODD_LABELS[case]
    text = f'{{"labels": [["0.png", 0], ["1.png", {label}]]}}'
    files = {"0.png": png(0), "1.png": png(1), "dataset.json": text.encode()}
    for path in (make_zip(tmp_path / "a.zip", files), make_folder(tmp_path / "in", files)):
        with pytest.raises(UserError, match="dataset.json") as caught:
            open_source(path)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_label_file_that_unfolds_to_gibibytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png())
        with archive.open("dataset.json", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(b" " * 2**20)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"dataset.json has 67,108,864 bytes, too many for the labels of 1 images"):
        open_source(str(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**23


def bomb(path: Path, head: bytes, *, name: str = "x.webp", gigabytes: int = 1) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("good.png", png())
        with archive.open(name, "w", force_zip64=True) as file:
            file.write(head)
            for _ in range(gigabytes * 64):
                file.write(bytes(2**24))
    return str(path)


def test_an_image_in_a_zip_that_unfolds_to_a_gibibyte_is_a_bad_image_unread(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.zip", b"RIFF\xff\xff\xff\x3fWEBPVP8 ")
    assert os.path.getsize(path) < 2**23
    tracemalloc.start()
    for options in ({}, {"resolution": 16, "channels": 3}):
        with pytest.raises(UserError, match=r"x.webp: 1,073,741,840 bytes are more than a picture may have"):
            pack(open_source(path), str(tmp_path / "out"), **QUIET, **options)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**26


def with_header(path: Path, header: str, *, name: str = "images", data: bytes = b"") -> str:
    text = header.encode().ljust(128 - 10) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return str(path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 1024, 1024, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 16, 16, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 16, 16, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999999, 16, 16, 3)}",
        "{'descr': '|V999999999999', 'fortran_order': False, 'shape': (1, 16, 16, 3)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 16, 16)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1, 16, 16)}",
        "((((((((((((((((((((((((((((((((((((((((((((((((((((((((",
        "__import__('os')",
        "",
    ],
)
def test_a_header_of_an_npz_that_promises_too_much_is_refused_before_memory_is_taken(
    header: str, tmp_path: Path
) -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.npz: "):
        open_source(with_header(tmp_path / "a.npz", header, data=bytes(768)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**25


# -- whatever comes ---------------------------------------------------------------------------------------------------


def test_mutated_zips_and_npz_give_a_sentence_or_a_right_result(tmp_path: Path) -> None:
    rng = random.Random(11)
    whole = Path(make_zip(tmp_path / "a.zip", {f"{n}.png": png(n) for n in range(3)})).read_bytes()
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 16, 16, 3), np.uint8), labels=np.arange(3))
    arrays = (tmp_path / "b.npz").read_bytes()
    outcomes = {"sound": 0, "refused": 0}
    for turn in range(120):
        data, name = (whole, "x.zip") if turn % 2 else (arrays, "x.npz")
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if turn % 5 == 0:
            del changed[rng.randrange(len(changed)) :]
        (tmp_path / name).write_bytes(changed)
        try:
            source = open_source(str(tmp_path / name))
            dest = tmp_path / f"out-{turn}"
            manifest = pack(source, str(dest), resolution=16, channels=3, skip_bad=True, **QUIET)
            assert manifest.num_samples <= 3
            outcomes["sound"] += 1
        except (UserError, TrainingFailed):
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 8, outcomes


def test_a_deep_tree_needs_no_stack(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "for _ in range(1100):\n"
        "    os.mkdir('d'); os.chdir('d')\n"
        "open('x.png', 'wb').close()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment())
    with pytest.raises(UserError, match="cannot be read: File name too long") if LONGEST < 2200 else nullcontext():
        assert len(open_source(str(tmp_path)).entries) == 1
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)
