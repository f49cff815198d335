"""Images a second of `dist-gan pack`, beside plain `webdataset.ShardWriter` in a loop over the same files.

    python benchmarks/pack.py [--json] [--count 40000] [--side 32] [--bucket-count 2000] [--latency-ms 20] [--rounds 3]

Rounds alternate between all ways. From a local folder to a local folder: ours with one and with two workers (whose start
counts), and the loop, which reads each file and writes it with its label, unseen; `webdataset_checked` is the same loop
with each image decoded by Pillow first, which ours always does. From a bucket to a bucket, on a server of another process
that answers every request after the latency: ours with one and with two workers, and with one worker that fetches one image
at a time. Size and channels are given to ours, so every image is read once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_gan.packing import fetching
from dist_gan.packing.pack import pack
from dist_gan.packing.sources import open_source
from dist_gan.storage.folder import StoreFolder

ROOT = Path(__file__).resolve().parents[1]
SAMPLES_PER_SHARD = 1000


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEGs of smooth noise in ten class folders."""
    rng = np.random.default_rng(0)
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        path = folder / f"class{n % 10}" / f"{n:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, format="JPEG", quality=90)


def shard_writer(source: Path, dest: Path, *, check: bool) -> None:
    """What one writes by hand: every file under its key with its label."""
    dest.mkdir()
    with webdataset.ShardWriter(f"{dest}/shard-%05d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for label, folder in enumerate(sorted(source.iterdir())):
            for path in sorted(folder.iterdir()):
                data = path.read_bytes()
                if check:
                    Image.open(io.BytesIO(data)).load()
                writer.write({"__key__": f"{folder.name}/{path.stem}", "jpg": data, "cls": label})


def ours(source: str, dest: str, side: int, *, workers: int) -> None:
    """Ours, as a user calls it."""
    options: dict[str, Any] = {"resolution": side, "channels": 3, "samples_per_shard": SAMPLES_PER_SHARD}
    pack(open_source(source), dest, workers=workers, progress=False, say=lambda _: None, **options)


def one_at_a_time(source: str, dest: str, side: int) -> None:
    """Ours without what it fetches ahead."""
    was, fetching.MAX_REQUESTS = fetching.MAX_REQUESTS, 1
    try:
        ours(source, dest, side, workers=1)
    finally:
        fetching.MAX_REQUESTS = was


def start_store(latency_s: float) -> subprocess.Popen[str]:
    """A server for objects, and the environment that leads to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "benchmarks" / "object_store.py"), str(port), str(latency_s)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    os.environ.update(
        AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    return server


def upload(source: Path, url: str) -> None:
    """Some of the images into the bucket."""
    folder = StoreFolder(url)
    files = sorted(path for path in source.rglob("*.jpg"))
    asked = fetching.prefetch(
        lambda path: folder.upload(path, str(path.relative_to(source))), files, size=lambda _: 0, num_threads=16
    )
    for _, done in asked:
        done()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--count", type=int, default=40_000, help="images of the local folder")
    parser.add_argument("--side", type=int, default=32, help="pixels, a power of two")
    parser.add_argument("--bucket-count", type=int, default=2_000, help="images of the bucket")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    side = options.side
    rates: dict[str, list[float]] = {}
    server = start_store(options.latency_ms / 1000)
    try:
        with tempfile.TemporaryDirectory() as name:
            top = Path(name)
            write_images(top / "many", options.count, side)
            write_images(top / "few", options.bucket_count, side)
            write_images(top / "fewest", max(10, options.bucket_count // 10), side)
            for few in ("few", "fewest"):
                upload(top / few, f"s3://bench/{few}")
            counts = {"many": options.count, "few": options.bucket_count, "fewest": max(10, options.bucket_count // 10)}
            ways: dict[str, tuple[str, Callable[[Path, str], None]]] = {
                "local_1": ("many", lambda out, url: ours(str(top / "many"), str(out), side, workers=1)),
                "webdataset": ("many", lambda out, url: shard_writer(top / "many", out, check=False)),
                "local_2": ("many", lambda out, url: ours(str(top / "many"), str(out), side, workers=2)),
                "webdataset_checked": ("many", lambda out, url: shard_writer(top / "many", out, check=True)),
                "bucket_1": ("few", lambda out, url: ours("s3://bench/few", url, side, workers=1)),
                "bucket_2": ("few", lambda out, url: ours("s3://bench/few", url, side, workers=2)),
                "bucket_1_one_at_a_time": ("fewest", lambda out, url: one_at_a_time("s3://bench/fewest", url, side)),
            }
            for turn in range(options.rounds + 1):
                for way, (data, do) in ways.items():
                    out = top / "out"
                    began = time.perf_counter()
                    do(out, f"s3://bench/out-{way}-{turn}")
                    seconds = time.perf_counter() - began
                    shutil.rmtree(out, ignore_errors=True)
                    if turn:  # the first time everything is imported and read from the disk
                        rates.setdefault(way, []).append(counts[data] / seconds)
    finally:
        server.terminate()
        server.wait()
    rows = [
        {
            "row": way,
            "images_per_s": round(statistics.median(found), 1),
            "lowest": round(min(found), 1),
            "highest": round(max(found), 1),
            "count": counts[ways[way][0]],
        }
        for way, found in rates.items()
    ]
    if not options.json:
        for row in rows:
            print(row)
    rate = {way: statistics.median(found) for way, found in rates.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(json.dumps({
        "benchmark": "pack",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "side": side, "latency_ms": options.latency_ms},
        "rows": rows,
        "summary": {
            "times_webdataset_1": round(rate["local_1"] / rate["webdataset"], 3),
            "times_webdataset_2": round(rate["local_2"] / rate["webdataset"], 3),
            "times_webdataset_checked_1": round(rate["local_1"] / rate["webdataset_checked"], 3),
            "times_webdataset_checked_2": round(rate["local_2"] / rate["webdataset_checked"], 3),
            "bucket_images_per_s": round(max(rate["bucket_1"], rate["bucket_2"]), 1),
            "times_one_at_a_time": round(rate["bucket_1"] / rate["bucket_1_one_at_a_time"], 2),
        },
    }))  # fmt: skip


if __name__ == "__main__":
    main()
