"""From a bucket of images to a bucket of shards over the S3 protocol: the same bytes as on a disk, and every fault."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
from moto.s3.models import FakeKey, s3_backends
from moto.server import ThreadedMotoServer
from PIL import Image

from dist_gan import storage
from dist_gan.data.manifest import Manifest, read_manifest
from dist_gan.packing import fetching
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.indexing import verify
from dist_gan.packing.pack import pack
from dist_gan.packing.sources import open_source
from dist_gan.packing.store_source import HEAD_BYTES
from dist_gan.pictures import encode_png
from dist_gan.storage.writing import PART_BYTES
from dist_gan.types import TrainingFailed, UserError
from tests.conftest import environment, free_port

QUIET = {"say": lambda sentence: None, "workers": 1}
CANARY = "canary-secret"


class Bucket:
    """What lies in a bucket, seen from inside the server."""

    def __init__(self, port: int) -> None:
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="data")
        self.backend = s3_backends["123456789012"]["aws"]

    def put(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            self.backend.put_object("data", name, data)

    def objects(self, folder: str) -> dict[str, FakeKey]:
        """Objects by name in a folder; an object that is written again is another one."""
        keys = self.backend.buckets["data"].keys
        return {name[len(folder) + 1 :]: key for name, key in list(keys.items()) if name.startswith(f"{folder}/")}

    def contents(self, folder: str) -> dict[str, bytes]:
        return {name: key.value for name, key in self.objects(folder).items()}

    def remove(self, name: str) -> None:
        self.backend.delete_object("data", name)


class Server:
    """moto on loopback, which can be away for a while; its buckets stay in the process, as a store's do on its disks."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._running: ThreadedMotoServer | None = None

    def start(self) -> None:
        self._running = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._running.start()

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
        self._running = None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server(free_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "canary-id", "AWS_SECRET_ACCESS_KEY": CANARY, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.port}", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    found.start()
    yield found
    found.stop()
    s3_backends["123456789012"]["aws"].reset()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def bucket(server: Server) -> Bucket:
    return Bucket(server.port)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photograph(width: int, height: int, *, seed: int) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(height, width, 3, seed=seed)).save(file, format="JPEG", exif=exif.tobytes(), quality=95)
    return file.getvalue()


def images(count: int = 30, *, side: int = 16) -> dict[str, bytes]:
    return {f"{('cat', 'dog')[n % 2]}/{n:03d}.png": encode_png(noise(side, side, 3, seed=n)) for n in range(count)}


def all_sorts() -> dict[str, bytes]:
    """Names and kinds of files that a bucket may hold."""
    found = images(10)
    found["dog/größe 50% [x] a+b#c?d@e.png"] = found.pop("dog/001.png")
    found["cat/deep/er/photograph.jpg"] = photograph(400, 300, seed=1)
    found["dog/wide.webp"] = webp(300, 200)
    assert len(found["cat/deep/er/photograph.jpg"]) > HEAD_BYTES < len(found["dog/wide.webp"])
    return found | {"notes.txt": b"x", "dog/.hidden.png": b"x"}


def webp(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(height, width, 3, seed=5)).save(file, format="WEBP", lossless=True)
    return file.getvalue()


def make_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def on_disk(tmp_path: Path, files: dict[str, bytes], **options: Any) -> tuple[dict[str, bytes], Manifest]:
    """What a pack of the same files from disk to disk leaves, but for `manifest.json`."""
    source = make_folder(tmp_path / "in", files)
    manifest = pack(open_source(source), str(tmp_path / "out"), **QUIET, **options)
    return {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name != "manifest.json"}, manifest


def same_but_for_the_origin(one: bytes, other: bytes) -> bool:
    a, b = (json.loads(data) for data in (one, other))
    assert a.pop("origin") != b.pop("origin"), "each knows its own source"
    return bool(a == b)


def requests(caplog: pytest.LogCaptureFixture, method: str) -> list[str]:
    """What the server was asked, by its own log."""
    lines = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
    return [line for line in lines if f"{method} /" in line]


# The same bytes


@pytest.mark.parametrize("workers", [1, 2])
def test_bucket_to_bucket_gives_the_bytes_that_disk_to_disk_gives(workers: int, bucket: Bucket, tmp_path: Path) -> None:
    files = all_sorts()
    bucket.put({f"photos/{name}": data for name, data in files.items()})
    bucket.put({"photos/": b"", "photos/emu/": b"", "photos/cat/": b"", "photos2/emu/x.png": files["cat/000.png"]})
    options = {"resolution": 16, "samples_per_shard": 5}
    source = open_source("s3://data/photos")
    assert source.classes == ("cat", "dog"), "objects that stand for folders are none"
    manifest = pack(source, "s3://data/shards", **{**QUIET, **options, "workers": workers})
    expected, local = on_disk(tmp_path, files, **options)
    found = bucket.contents("shards")
    assert same_but_for_the_origin(found.pop("manifest.json"), (tmp_path / "out" / "manifest.json").read_bytes())
    assert found == expected
    assert manifest.fingerprint == local.fingerprint
    assert (manifest.num_samples, manifest.classes, manifest.class_counts) == (12, ("cat", "dog"), (6, 6))
    assert verify("s3://data/shards", workers=1) == []


def test_bucket_to_disk_and_disk_to_bucket_give_the_same_bytes_too(bucket: Bucket, tmp_path: Path) -> None:
    files = images(12)
    bucket.put({f"photos/{name}": data for name, data in files.items()})
    expected, _ = on_disk(tmp_path, files, samples_per_shard=5)
    pack(open_source(str(tmp_path / "in")), "s3://data/shards/", samples_per_shard=5, **QUIET)
    pack(open_source("s3://data/photos/"), str(tmp_path / "other"), samples_per_shard=5, **QUIET)
    here = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    for found in (bucket.contents("shards"), here):
        assert read_manifest(str(tmp_path / "other")).num_samples == 12
        found.pop("manifest.json")
        assert found == expected


def test_a_stylegan_label_file_in_a_bucket_gives_the_labels(bucket: Bucket) -> None:
    files = {f"0/{n}.png": encode_png(noise(16, 16, 3, seed=n)) for n in range(4)}
    labels = json.dumps({"labels": [[name, n % 2] for n, name in enumerate(files)]}).encode()
    bucket.put({f"photos/{name}": data for name, data in {**files, "dataset.json": labels}.items()})
    source = open_source("s3://data/photos")
    assert [entry.label for entry in source.entries] == [0, 1, 0, 1]
    assert pack(source, "s3://data/shards", **QUIET).class_counts == (2, 2)


def test_a_tree_of_many_folders_is_listed_by_one_request_a_thousand_files(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.put({f"photos/{n % 300:03d}/{n}.png": b"x" for n in range(2500)})
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        assert len(open_source("s3://data/photos").entries) == 2500
    assert len(requests(caplog, "GET")) == 3


def test_every_image_is_asked_for_once_when_size_and_channels_are_given(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.put({f"photos/{name}": data for name, data in images(20).items()})
    source = open_source("s3://data/photos")
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        pack(source, "s3://data/shards", resolution=16, channels=3, **QUIET)
    of_images = [line for line in (*requests(caplog, "GET"), *requests(caplog, "HEAD")) if "/photos/" in line]
    assert len(of_images) == 20


# Kills


def start_pack(*arguments: str, temporary: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dist_gan.cli", "pack", *arguments]
    return subprocess.Popen(command, env=environment(TMPDIR=str(temporary)), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_killed_half_way_goes_on_and_writes_no_finished_shard_again(
    workers: int, bucket: Bucket, tmp_path: Path
) -> None:
    files = images(200)
    bucket.put({f"photos/{name}": data for name, data in files.items()})
    command = ["s3://data/photos", "s3://data/shards", "--resolution", "16", "--channels", "3"]
    command += ["--samples-per-shard", "10", "--workers", str(workers)]
    (temporary := tmp_path / "tmp").mkdir()
    process = start_pack(*command, temporary=temporary)
    until = time.monotonic() + 120
    while sum(name.endswith(".tar") for name in bucket.objects("shards")) < 5 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)  # workers leave with their parent
    kept = bucket.objects("shards")
    whole = {name for name in kept if name.endswith(".tar") and f".{name[:-4]}.json" in kept}
    assert 5 <= len(whole) < 20, "the kill came too early or too late to prove anything"
    assert "manifest.json" not in kept
    with pytest.raises(UserError, match=r"no manifest.json there; run `dist-gan pack`"):
        read_manifest("s3://data/shards")
    time.sleep(0.5)
    assert bucket.objects("shards") == kept, "a worker outlived its parent"
    assert list(temporary.iterdir()) == [], "half a shard stayed on the disk"
    process = start_pack(*command, temporary=temporary)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"going on: {len(whole)} of 20 shards are there already" in said
    after = bucket.objects("shards")
    assert {name for name in whole if after[name] is not kept[name]} == set()
    expected, _ = on_disk(tmp_path, files, samples_per_shard=10, resolution=16, channels=3)
    assert {name: key.value for name, key in after.items() if name != "manifest.json"} == expected


@pytest.mark.parametrize("damaged", ["shard-{}.tar", ".shard-{}.json"])
def test_a_shard_or_an_index_that_is_not_whole_is_made_again(damaged: str, bucket: Bucket) -> None:
    bucket.put({f"photos/{name}": data for name, data in images(40).items()})
    source = open_source("s3://data/photos")
    options = {"resolution": 16, "channels": 3, "samples_per_shard": 10}
    missing = source.entries[0].member
    data = bucket.contents("photos")[missing]
    bucket.remove(f"photos/{missing}")
    with pytest.raises(TrainingFailed, match=f"s3://data/photos/{missing}: was there when the pack began and is gone"):
        pack(source, "s3://data/shards", **QUIET, **options)
    bucket.put({f"photos/{missing}": data})
    kept = bucket.objects("shards")
    whole = [name[6:-4] for name in kept if name.endswith(".tar")]
    assert whole, "nothing was made before the missing image"
    name = damaged.format(whole[0])
    bucket.put({f"shards/{name}": bucket.contents("shards")[name][:-20]})
    pack(source, "s3://data/shards", **QUIET, **options)
    after = bucket.objects("shards")
    assert after[f"shard-{whole[0]}.tar"] is not kept[f"shard-{whole[0]}.tar"]
    assert all(after[f"shard-{number}.tar"] is kept[f"shard-{number}.tar"] for number in whole[1:])
    pack(source, "s3://data/at-once", **QUIET, **options)
    assert bucket.contents("shards") == bucket.contents("at-once")


def test_a_finished_pack_is_recognised_and_what_a_kill_after_the_manifest_left_is_cleaned(bucket: Bucket) -> None:
    bucket.put({f"photos/{name}": data for name, data in images(10).items()})
    source = open_source("s3://data/photos")
    first = pack(source, "s3://data/shards", **QUIET)
    before = bucket.objects("shards")
    for name in (".pack-plan.json", ".shard-00000.json", ".pack-owner"):
        bucket.put({f"shards/{name}": b"{}"})
    said: list[str] = []
    assert pack(source, "s3://data/shards", workers=1, say=said.append) == first
    assert "already packed: 10 images in 1 shards" in said[0]
    assert bucket.objects("shards") == before
    with pytest.raises(UserError, match="holds 10 images from another pack"):
        pack(source, "s3://data/shards", labels=False, **QUIET)


def test_of_two_packs_in_one_folder_the_earlier_one_stops(bucket: Bucket) -> None:
    class Intruder:
        """Another pack begins while the tenth image is read."""

        def open(self, entry: Any) -> np.ndarray:
            if entry.key == "00000010":
                bucket.put({"shards/.pack-owner": b"0" * 32})
            return noise(16, 16, 3)

    source = ArraySource(noise(100, 16, 16, 3))
    source.reader = Intruder()
    with pytest.raises(TrainingFailed, match=r"s3://data/shards: another pack has begun there, and this one stops"):
        pack(source, "s3://data/shards", samples_per_shard=10, resolution=16, channels=3, **QUIET)
    shards = [name for name in bucket.objects("shards") if name.endswith(".tar")]
    assert 1 <= len(shards) < 10
    assert "manifest.json" not in bucket.objects("shards")


# Bad images, changed sources


def test_a_bad_image_in_a_bucket_is_told_or_left_out_as_on_a_disk(bucket: Bucket, tmp_path: Path) -> None:
    files = {**images(20), "cat/cut.jpg": photograph(400, 300, seed=1)[:-5000], "dog/empty.png": b"", "dog/t.jpg": b"x"}
    bucket.put({f"photos/{name}": data for name, data in files.items()})
    source, local = open_source("s3://data/photos"), open_source(make_folder(tmp_path / "in", files))
    for options in ({"resolution": 16}, {"resolution": 16, "channels": 3}):
        told = []
        for found, dest in ((source, "s3://data/shards"), (local, str(tmp_path / "bad"))):
            with pytest.raises(UserError, match="images that cannot be packed") as caught:
                pack(found, dest, **QUIET, **options)
            told.append(str(caught.value).replace(found.place, "PLACE"))
        assert told[0] == told[1]
        assert not [name for name in bucket.objects("shards") if name.endswith("tar") or name == "manifest.json"]
    said: list[str] = []
    options = {"resolution": 16, "channels": 3, "skip_bad": True, "samples_per_shard": 7}
    for name in bucket.objects("shards"):
        bucket.remove(f"shards/{name}")
    manifest = pack(source, "s3://data/shards", workers=1, say=said.append, **options)
    assert manifest.num_samples == 20
    assert "left out 3 bad images; they are listed in s3://data/shards/skipped.txt" in said[-1]
    expected, _ = on_disk(tmp_path, files, **options)
    found = bucket.contents("shards")
    del found["manifest.json"]
    assert found == expected


@pytest.mark.parametrize("change", ["longer", "shorter", "gone"])
def test_an_object_that_changes_under_the_pack_is_no_bad_image_and_is_not_left_out(change: str, bucket: Bucket) -> None:
    bucket.put({f"photos/{name}": data for name, data in images(20).items()})
    source = open_source("s3://data/photos")
    data = bucket.contents("photos")["cat/000.png"]
    if change == "gone":
        bucket.remove("photos/cat/000.png")
    else:
        bucket.put({"photos/cat/000.png": data + b"x" if change == "longer" else data[:-1]})
    with pytest.raises(TrainingFailed, match=r"s3://data/photos/cat/000.png: .*(is gone|was changed in the meantime)"):
        pack(source, "s3://data/shards", resolution=16, channels=3, skip_bad=True, **QUIET)
    assert "manifest.json" not in bucket.objects("shards")


def test_a_source_whose_object_was_replaced_by_one_of_the_same_size_is_another_source(bucket: Bucket) -> None:
    bucket.put({f"photos/{name}": data for name, data in images(4).items()})
    pack(open_source("s3://data/photos"), "s3://data/shards", **QUIET)
    data = bytearray(bucket.contents("photos")["cat/000.png"])
    data[60] ^= 1
    bucket.put({"photos/cat/000.png": bytes(data)})
    with pytest.raises(UserError, match="another pack .*, or the source or an option has changed since"):
        pack(open_source("s3://data/photos"), "s3://data/shards", **QUIET)


# What is refused


def test_a_destination_in_the_source_or_with_other_things_in_it_is_refused(bucket: Bucket) -> None:
    bucket.put({f"photos/{name}": data for name, data in images(4).items()})
    before = set(bucket.objects("photos"))
    source = open_source("s3://data/photos")
    for dest in ("s3://data/photos", "s3://data/photos/", "s3://data/photos/shards"):
        with pytest.raises(UserError, match=rf"destination {dest}: lies inside the source s3://data/photos; give"):
            pack(source, dest, **QUIET)
    with pytest.raises(UserError, match=r"destination s3://data: is not empty \(photos\) and no pack was begun there"):
        pack(source, "s3://data", **QUIET)
    bucket.put({"thesis/thesis.pdf": b"precious"})
    with pytest.raises(UserError, match=r"s3://data/thesis: is not empty \(thesis.pdf\).*choose another folder"):
        pack(source, "s3://data/thesis", **QUIET)
    assert set(bucket.objects("photos")) == before
    assert bucket.contents("thesis") == {"thesis.pdf": b"precious"}
    assert pack(source, "s3://data/photos2", **QUIET).num_samples == 4


def test_what_cannot_be_a_source_is_told_in_a_sentence(bucket: Bucket) -> None:
    bucket.put({"text/a.txt": b"x", "empty/": b""})
    for url, words in {
        "s3://data/none": "s3://data/none: nothing is there; give a folder of images",
        "s3://none/photos": "s3://none/photos: nothing is there",
        "s3://data/empty": "nothing is there",
        "s3://data/text": "s3://data/text: no images there .passed over 1 files: not an image type that is read: 1 .txt.",
        "s3://data/a.npz": "packed from local files only; copy them to a disk first",
        "https://host/photos": "https://host/photos: an HTTP server has no listing",
        "s3://KEY:SECRET@data/photos": "came with a user part or a query",
        "ssh://host/photos": "the scheme 'ssh' .* is refused",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            open_source(url)
        assert "SECRET" not in str(caught.value)


def test_a_bucket_that_is_not_there_cannot_be_packed_into(bucket: Bucket) -> None:
    with pytest.raises(TrainingFailed, match=r"cannot write s3://none/shards/.pack-owner .*bucket does not exist"):
        pack(ArraySource(noise(4, 16, 16, 3)), "s3://none/shards", **QUIET)


# Stores that do not answer


def test_without_credentials_nothing_is_waited_for(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    fsspec.filesystem("s3").clear_instance_cache()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cannot list s3://data/photos: the store refuses access; check the credent"):
        open_source("s3://data/photos")
    assert time.monotonic() - began < storage.patience.PATIENCE_S / 4


def test_a_store_that_goes_away_ends_the_pack_in_one_sentence_and_it_goes_on_later(
    server: Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = images(400)
    bucket.put({f"photos/{name}": data for name, data in files.items()})
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 2.0)
    options = {"resolution": 16, "channels": 3, "samples_per_shard": 20}
    source = open_source("s3://data/photos")

    def leave() -> None:
        while not any(name.endswith(".tar") for name in bucket.objects("shards")):
            time.sleep(0.005)
        server.stop()

    threading.Thread(target=leave, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(TrainingFailed, match=r"cannot (read|write) s3://data/.*the store has not answered for 2") as e:
        pack(source, "s3://data/shards", **QUIET, **options)
    assert time.monotonic() - began < 60
    assert "canary" not in str(e.value)
    with pytest.raises(TrainingFailed, match=r"cannot list s3://data/shards: .*start the same command again when it d"):
        pack(source, "s3://data/shards", **QUIET, **options)
    kept = bucket.objects("shards")
    assert "manifest.json" not in kept
    server.start()
    pack(source, "s3://data/shards", **QUIET, **options)
    expected, _ = on_disk(tmp_path, files, **options)
    found = bucket.contents("shards")
    del found["manifest.json"]
    assert found == expected
    assert any(bucket.objects("shards").get(name) is key for name, key in kept.items() if name.endswith(".tar"))


# Memory


def peak_rss_of_pack(*arguments: str) -> int:
    """Bytes that the process of a pack had at most."""
    # Not getrusage: there a child begins with what its parent had.
    code = (
        "import re, sys\n"
        "from dist_gan.cli import main\n"
        "code = main(['pack', *sys.argv[1:]])\n"
        "print(1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def test_memory_stays_within_the_bound_whatever_the_size_of_the_shards_and_of_the_data(bucket: Bucket) -> None:
    big = encode_png(noise(512, 512, 3))
    bucket.put({f"few/{n}.png": encode_png(noise(16, 16, 3, seed=n)) for n in range(3)})
    bucket.put({f"many/{n}.png": big for n in range(400)})
    options = ["--channels", "3", "--workers", "1", "--samples-per-shard", "400"]
    few = peak_rss_of_pack("s3://data/few", "s3://data/few-shards", "--resolution", "16", *options)
    many = peak_rss_of_pack("s3://data/many", "s3://data/many-shards", "--resolution", "512", *options)
    sent = bucket.contents("many-shards")["shard-00000.tar"]
    assert hashlib.sha256(sent).hexdigest() == read_manifest("s3://data/many-shards").shards[0].sha256
    decoded = 3 * 512 * 512
    # Beside what is counted: what the allocator and the client keep of requests that are done.
    kept = 40 * 2**20
    bound = fetching.MAX_PENDING_BYTES + 2 * PART_BYTES + 8 * decoded + kept
    assert len(sent) > 2 * bound, "too little data to prove anything"
    assert many - few < bound, f"{(many - few) / 2**20:.0f} MiB"
