"""Tars and manifests that somebody wrote to do harm, or a disk has spoilt: a sentence or a right result, in little memory."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gan.data.manifest import read_manifest
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.indexing import index, verify
from dist_gan.packing.pack import pack
from dist_gan.packing.tar_scan import DamagedTar, TarScan
from dist_gan.pictures import encode_png
from dist_gan.types import UserError

QUIET = {"say": lambda sentence: None, "workers": 1, "progress": False}
PNG = encode_png(np.full((16, 16, 3), 7, np.uint8))
Members = list[tuple[str, bytes]]


def tar_of(members: Members, **pax: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax.get(name.partition(".")[0], {})
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def labelled(*labels: bytes, extension: str = "cls") -> Members:
    return [m for n, label in enumerate(labels) for m in ((f"k{n}.png", PNG), (f"k{n}.{extension}", label))]


def scanned(data: bytes, **options: Any) -> list[Any]:
    return list(TarScan(io.BytesIO(data), size=len(data), place="a.tar", **options))


def refused(folder: Path, data: bytes, **options: Any) -> str:
    (folder / "a.tar").write_bytes(data)
    with pytest.raises(UserError) as caught:
        index(str(folder), **QUIET, **options)
    assert len(str(caught.value)) < 3000
    assert all(sign.isprintable() or sign == "\n" for sign in str(caught.value))
    return str(caught.value)


# -- tars -------------------------------------------------------------------------------------------------------------


def with_size_field(field: bytes) -> bytes:
    data = bytearray(tar_of([("a.png", PNG)]))
    header = data[:512]
    header[124:136] = field.ljust(12, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    return bytes(header + data[512:])


SIZES = {
    "2^63": b"\x80" + (2**63).to_bytes(11, "big"),
    "2^88 - 1": b"\x80" + b"\xff" * 11,
    "-1 in base 256": b"\xff" * 12,
    "-1 in octal": b"-1",
    "a sign": b"+17",
    "an underscore": b"1_7",
    "letters": b"0o17",
    "nothing": b"",
}


@pytest.mark.parametrize("case", SIZES)
def test_a_size_that_no_file_has_is_damage(case: str, tmp_path: Path) -> None:
    assert "a.tar at byte 0: " in refused(tmp_path, with_size_field(SIZES[case]))


PAX = {
    "5,000 digits": b"size=" + b"9" * 5000,
    "5,000 zeros": b"size=" + b"0" * 5000 + b"5",
    "negative": b"size=-5",
    "other digits": "size=\u0665".encode(),
    "sparse": b"GNU.sparse.major=1",
}


def with_pax(record: bytes, *, length: bytes | None = None) -> bytes:
    body = record + b"\n"
    digits = length if length is not None else str(len(body) + 5).encode().rjust(4, b"0")
    payload = digits + b" " + body
    header = tarfile.TarInfo("pax")
    header.size, header.type = len(payload), tarfile.XHDTYPE
    return header.tobuf() + payload + bytes(-len(payload) % 512) + tar_of([("a.png", PNG)])


@pytest.mark.parametrize("case", PAX)
def test_an_extended_header_that_says_something_odd_is_damage(case: str, tmp_path: Path) -> None:
    assert "a.tar at byte" in refused(tmp_path, with_pax(PAX[case]))


@pytest.mark.parametrize("length", [b"9" * 5000, b"-5", b"0", b"3", b"", b"99999999999999999999"])
def test_an_extended_record_of_an_odd_length_is_damage(length: bytes, tmp_path: Path) -> None:
    assert "an extended header is damaged" in refused(tmp_path, with_pax(b"path=x.png", length=length))


def test_a_long_extended_header_is_refused_unread_and_one_of_many_records_takes_no_time() -> None:
    many = b"".join(b"6 a=b\n" for _ in range(150_000))
    header = tarfile.TarInfo("pax")
    header.size, header.type = len(many), tarfile.XHDTYPE
    whole = header.tobuf() + many + bytes(-len(many) % 512) + tar_of([("a.png", PNG)])
    assert [m.name for m in scanned(whole)] == ["a.png"]
    header.size = 2**21
    with pytest.raises(DamagedTar, match="an extended header of 2,097,152 bytes"):
        scanned(header.tobuf() + bytes(2**21) + tar_of([("a.png", PNG)]))


def test_names_with_control_signs_are_escaped_in_every_message(tmp_path: Path) -> None:
    evil = "a\x1b]0;owned\x07\ndist-gan: fine"
    assert "\\x1b" in refused(tmp_path, tar_of([("k.png", b"bad")], k={"path": f"{evil}.png"}))
    assert "\\x1b" in refused(tmp_path, tar_of([("k.png", PNG), ("l.cls", b"1")], l={"path": f"{evil}.cls"}))


def test_a_member_that_is_larger_than_an_image_may_be_is_read_in_parts(tmp_path: Path) -> None:
    data = tar_of([("film.mp4", bytes(2**24)), ("a.png", PNG)])
    tracemalloc.start()
    members = list(TarScan(io.BytesIO(data), size=len(data), place="a.tar", hold=2**20))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(m.name, m.data) for m in members] == [("film.mp4", None), ("a.png", PNG)]
    assert most < 2**23


def test_mutated_tars_give_a_sentence_or_what_is_really_in_them(tmp_path: Path) -> None:
    rng = random.Random(7)
    whole = tar_of([*labelled(b"0", b"1", b"2"), ("x" * 150 + ".png", PNG)], k1={"comment": "z" * 300})
    refusals = 0
    for turn in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            at = rng.choice((rng.randrange(len(data)), 512 * rng.randrange(len(data) // 512) + rng.randrange(160)))
            data[at] = rng.choice((0, 32, 45, 48, 57, 128, 255, rng.randrange(256)))
        for at in range(0, len(data) - 511, 512):  # a right checksum lets damage through that it would have caught
            if data[at + 257 : at + 262] == b"ustar" and turn % 2:
                total = sum(data[at : at + 148]) + sum(data[at + 156 : at + 512]) + 256
                data[at + 148 : at + 156] = b"%06o\0 " % total
        if turn % 7 == 0:
            del data[rng.randrange(len(data)) :]
        try:
            for member in scanned(bytes(data)):
                assert data[member.offset : member.offset + member.size] == member.data
        except DamagedTar:
            refusals += 1
    assert 100 < refusals < 400


# -- labels -----------------------------------------------------------------------------------------------------------


def json_labels(*values: object, key: str = "class") -> Members:
    return labelled(*(json.dumps({key: value}).encode() for value in values), extension="json")


def test_names_under_a_json_key_become_classes_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(json_labels("dog", "cat", "dog")))
    (tmp_path / "b.tar").write_bytes(tar_of([(f"b{name}", data) for name, data in json_labels("\u00e9mu", " cat ")]))
    manifest = index(str(tmp_path), label_key="class", **QUIET)
    assert manifest.classes == ("cat", "dog", "\u00e9mu")
    assert [shard.labels for shard in manifest.shards] == [(1, 0, 1), (2, 0)]
    assert read_manifest(str(tmp_path)) == manifest
    assert verify(str(tmp_path), workers=1) == []
    (tmp_path / "b.tar").write_bytes(tar_of([(f"b{name}", data) for name, data in json_labels("10", "2")]))
    (tmp_path / "a.tar").write_bytes(tar_of(json_labels("0", "1", "2")))
    manifest = index(str(tmp_path), label_key="class", force=True, **QUIET)
    assert manifest.classes == tuple(map(str, range(11)))
    assert [shard.labels for shard in manifest.shards] == [(0, 1, 2), (10, 2)]


ODD_JSON = {
    "float": (json_labels(0, 1.5), "'k1': .json holds 1.5 under 'class', not a whole number from 0 on nor the name"),
    "boolean": (json_labels(0, True), "holds True under 'class', not a whole number"),
    "negative": (json_labels(0, -3), "holds -3 under 'class', not a whole number"),
    "null": (json_labels(0, None), "holds None under 'class', not a whole number"),
    "list": (json_labels(0, [1]), "holds [1] under 'class', not a whole number"),
    "empty": (json_labels("a", " "), "holds ' ' under 'class', not the name of a class"),
    "long": (json_labels("a", "x" * 5000), "under 'class', not the name of a class"),
    "mixed": (json_labels(3, "cat"), "some labels are numbers (3, for one) and others are names ('cat'); use one kind"),
    "huge": (json_labels(0, 99_999_999), "holds 99999999 under 'class', and there are at most 1,048,576 classes"),
    "huge text": (json_labels("0", "99999999"), "the highest label is 99,999,999, and there are at most 1,048,576"),
    "other key": (json_labels(0, key="category"), "holds None under 'class', not a whole number from 0 on nor the name of a "
                  "class; it has 'category'"),
    "no object": (labelled(b"[1]", extension="json"), ".json holds [1], and no object with 'class' in it"),
    "no json": (labelled(b"{", extension="json"), ".json is not JSON"),
    "digits": (labelled(b'{"class": ' + b"9" * 5000 + b"}", extension="json"), "a number of thousands of digits"),
    "nested": (labelled(b"[" * 10**5, extension="json"), ".json is not JSON"),
    "half a sign": (labelled(b'{"class": "\\ud800"}', extension="json"), "not the name of a class"),
    "missing": ([*json_labels(0), ("z.png", PNG)], "'z': has no .json to take 'class' from"),
    "large": (labelled(b" " * 2**21 + b"{}", extension="json"), "its label file has 2,097,154 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_JSON)
def test_an_odd_label_under_a_json_key_is_told_with_its_image(case: str, tmp_path: Path) -> None:
    members, words = ODD_JSON[case]
    assert words in refused(tmp_path, tar_of(members), label_key="class")


def test_captions_are_no_classes(tmp_path: Path) -> None:
    words = "1,100 images have 1,100 different texts"
    data = tar_of(json_labels(*(f"a picture of {n}" for n in range(1100))))
    assert words in refused(tmp_path, data, label_key="class")


@pytest.mark.parametrize("label", [b"99999999", b"1048576", b"9" * 5000, b"-1", b"1.0", b"cat", "\u0665".encode(), b""])
def test_an_odd_number_in_a_cls_is_told_before_classes_are_made(label: bytes, tmp_path: Path) -> None:
    assert "'k1': .cls holds " in refused(tmp_path, tar_of(labelled(b"0", label)))


# -- names with several dots ------------------------------------------------------------------------------------------

DOTTED = (
    "webdataset splits names at the first dot, so 'img.0.v2.jpg' is the file '0.v2.jpg' of the key 'img' and no image"
)


def test_a_name_with_several_dots_is_explained_as_webdataset_understands_it(tmp_path: Path) -> None:
    assert DOTTED in refused(tmp_path, tar_of([("img.0.v2.jpg", PNG)]))
    assert "rename it, to 'img_0_v2.jpg'" in refused(tmp_path, tar_of([("img.0.v2.jpg", PNG), ("img.cls", b"1")]))
    said: list[str] = []
    members = [("a.png", PNG), ("img.0.v2.jpg", PNG), ("a.seg.png", PNG), ("b.txt", b"x"), ("README", b"x")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert index(str(tmp_path), workers=1, say=said.append).num_samples == 1
    assert "passed over 3 members that belong to no image: " in said[0]
    assert "1 .txt" in said[0]
    assert f"1 of them look like images; {DOTTED}" in said[1]


# -- manifests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    pack(ArraySource(images, np.arange(20) % 4), str(tmp_path), samples_per_shard=10, **QUIET)
    return tmp_path


ODD_VALUES: list[Any] = [
    2**63, 2**63 - 1, 2**64, 10**4000, -1, -(2**63), 0, 1.0, float("nan"), float("inf"), True, None, "", "x", [], [[1]],
    [1, [2]], [2**63], [True] * 10, [1.0] * 10, [float("nan")] * 10, ["a"] * 10, {}, {"a": 1}, [{}], ["\ud800"] * 10,
    [2**62] * 10, [0] * 10, list(range(10)), [list(range(10))], "\x1b[31m", "../x",
]  # fmt: skip


def test_whatever_stands_in_a_manifest_it_is_a_sentence_or_a_manifest(packed: Path) -> None:
    path = packed / "manifest.json"
    whole = json.loads(path.read_text())
    refusals = 0
    places = [(None, key) for key in whole] + [(0, key) for key in whole["shards"][0]]
    for shard, key in places:
        for value in ODD_VALUES:
            content = json.loads(json.dumps(whole))
            (content if shard is None else content["shards"][shard])[key] = value
            path.write_text(json.dumps(content))
            said = ""
            try:
                manifest = read_manifest(str(packed))
                assert manifest.fingerprint
                assert manifest.num_samples == 20
            except UserError as error:
                refusals += 1
                said = str(error)
            assert len(said) < 1000
            assert said.isprintable()
    assert refusals > len(places) * len(ODD_VALUES) // 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b'{"format": "dist_gan.shards", "version": 1, "resolution": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
        (b"null", "the format is 'NoneType'"),
    ],
)
def test_a_manifest_that_is_no_json_of_ours_is_one_sentence(data: bytes, words: str, packed: Path) -> None:
    (packed / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_manifest(str(packed))


def test_mutated_manifests_are_a_sentence_or_a_manifest(packed: Path) -> None:
    rng = random.Random(3)
    path = packed / "manifest.json"
    whole, refusals = path.read_bytes(), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.choice(b'0123456789[]{},:"-.eE\\untrfals ')
        path.write_bytes(data)
        try:
            read_manifest(str(packed)).fingerprint  # noqa: B018
        except UserError:
            refusals += 1
    assert refusals > 100
