"""How fast images come: ours, webdataset's documented pipeline, the same with simplejpeg, mosaicml-streaming, the bare decoder.

    python benchmarks/stream.py [--json] [--rounds 5] [--seconds 3] [--cifar ZIP] [--mosaic-python PYTHON] [--large GIB]

All have the same two cores (then one and the same), and hand over uint8 batches of 64, shuffled. Every reader is a
process of its own that stands still while another one reads; rounds alternate, and ratios are taken round by round. 32x32:
CIFAR-10 as JPEG files; 256x256: the same pictures enlarged, with noise, 27 KB each. With latency: an HTTP server on one core
that waits 20 ms before each answer, the reader on the other, beside the same reader on local files. mosaicml-streaming is
read by the interpreter that `--mosaic-python` names, where it is installed, and left out otherwise. `--large` writes so many
GiB of shards and measures the memory of reading them, and how long the first batch takes at image 0 and at image 10^9.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "stream_worker.py"
BATCH = 64
LATENCY_S = 0.02


def write_zips(cifar: Path, folder: Path, *, images_32: int, images_256: int) -> None:
    """`32.zip` and `256.zip`, a folder a class, plain JPEG files."""
    chance = np.random.default_rng(0)
    with zipfile.ZipFile(cifar) as source:
        names = sorted(name for name in source.namelist() if name.endswith((".jpg", ".png")))
        classes = sorted({name.split("/")[-2] for name in names})
        names = [names[k] for k in chance.permutation(len(names))]
        for side, count in ((32, images_32), (256, images_256)):
            with zipfile.ZipFile(folder / f"{side}.zip", "w") as target:
                for number, name in enumerate(names[:count]):
                    data = source.read(name)
                    if side == 256:
                        large = Image.open(io.BytesIO(data)).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
                        noisy = np.asarray(large) + chance.normal(0, 6, (256, 256, 3))
                        file = io.BytesIO()
                        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
                        data = file.getvalue()
                    target.writestr(f"{classes.index(name.split('/')[-2])}/{number:06d}.jpg", data)


class Reader:
    """A reader in a process of its own; it and the processes that it has started stand still unless they are asked.

    Without that, workers of one that fill their queues after its turn would do so in the turn of the next one.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        side: int,
        *,
        python: str = sys.executable,
        threads: int = 2,
        core: int | None = None,
    ) -> None:
        command = [python, str(WORKER), name, folder, str(side), str(BATCH), str(threads)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=(lambda: os.sched_setaffinity(0, {core})) if core is not None else None,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        atexit.register(self._kill)
        ready = self.process.stdout.readline()
        if ready != "ready\n":
            raise SystemExit(f"{name} cannot read {folder}: it said {ready!r}")
        os.killpg(self.process.pid, signal.SIGSTOP)

    def rate(self, seconds: float) -> float:
        """Images a second."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        print(seconds, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        os.killpg(self.process.pid, signal.SIGSTOP)
        return float(answer["images"] / answer["seconds"])

    def close(self) -> None:
        """Ends it, with the processes that it has started."""
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def compared(readers: dict[str, Reader], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images a second of each reader, round by round; the first round is for warming up."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, reader in readers.items():
            rate = reader.rate(seconds)
            if turn:
                rates[name].append(rate)
    for reader in readers.values():
        reader.close()
    return rates


def ratio(rates: dict[str, list[float]], name: str, others: list[str]) -> float:
    """Median over rounds of one reader over the best of others."""
    best = [max(values) for values in zip(*(rates[other] for other in others), strict=True)]
    return round(statistics.median(a / b for a, b in zip(rates[name], best, strict=True)), 3)


class SlowServer(BaseHTTPRequestHandler):
    """Ranges of files, each after a wait."""

    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        time.sleep(LATENCY_S)
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        first, last = 0, size - 1
        wanted = self.headers.get("Range")
        if wanted:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if body:
            with open(path, "rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(folder: Path) -> None:
    """The server of the latency rows, in a process of its own: prints its port."""
    os.sched_setaffinity(0, {1})
    SlowServer.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    print(server.server_port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


def wait_share(folder: str, *, step_s: float = 0.1, steps: int = 60) -> float:
    """Share of the time that a loop with steps of 100 ms waits for its images."""
    import torch

    from dist_gan.config import ShardsData
    from dist_gan.data import ImageStream, ShardFolder
    from dist_gan.data.manifest import read_manifest
    from dist_gan.draws import Draws

    stream = ImageStream(
        [(ShardFolder(folder, read_manifest(folder)), 1)], section=ShardsData(url=folder, cache=0), resolution=256, channels=3,
        classes=0, batch=BATCH, slots=torch.arange(BATCH), draws=Draws(0),
    )  # fmt: skip
    stream.next()
    waited, began = stream.waited_s, time.perf_counter()
    for _ in range(steps):
        time.sleep(step_s)
        stream.next()
    share = (stream.waited_s - waited) / (time.perf_counter() - began)
    stream.close()
    return share


def large(files: Path, folder: Path, *, gib: float) -> dict[str, Any]:
    """Memory of reading many large shards, and the time to the first batch at two positions."""
    import torch
    import webdataset

    from dist_gan.config import ShardsData
    from dist_gan.data import ImageStream, ShardFolder
    from dist_gan.data.manifest import read_manifest
    from dist_gan.draws import Draws
    from dist_gan.packing.indexing import index

    with zipfile.ZipFile(files) as archive:
        pictures = [archive.read(name) for name in archive.namelist()[:1000]]
    count = int(gib * 2**30 / np.mean([len(p) for p in pictures]))
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "shard-%05d.tar"), maxcount=10_000, verbose=0) as writer:
        for number in range(count):
            writer.write({"__key__": f"{number:08d}", "jpg": pictures[number % len(pictures)]})
    index(str(folder), progress=False)
    source = ShardFolder(str(folder), read_manifest(str(folder)))

    def stream(memory: int) -> ImageStream:
        section = ShardsData(url=str(folder), cache=0, memory=memory)
        return ImageStream(
            [(source, 1)], section=section, resolution=256, channels=3, classes=0, batch=BATCH,
            slots=torch.arange(BATCH), draws=Draws(0),
        )  # fmt: skip

    first: dict[str, list[float]] = {"0": [], "1000000000": []}
    for _ in range(5):
        for position in first:
            reader = stream(2**29)
            reader.seek(int(position) // BATCH)
            began = time.perf_counter()
            reader.next()
            first[position].append(time.perf_counter() - began)
            reader.close()
    rows = {f"first_batch_s_at_{position}": round(statistics.median(s), 3) for position, s in first.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reader = stream(2**29)
    for _ in range(count // BATCH):
        reader.next()
    reader.close()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return rows | {
        "shards_gib": round(sum(s.bytes for s in source.manifest.shards) / 2**30, 2),
        "images": count,
        "bound_mib": round(reader._plan.memory / 2**20, 1),
        "most_held_mib": round(reader.most_bytes / 2**20, 1),
        "peak_rss_growth_over_a_pass_mib": round(after - before, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each reader in each round")
    parser.add_argument("--cifar", type=Path, default=ROOT.parent / "shared" / "data" / "cifar10-train.zip")
    parser.add_argument("--images-256", type=int, default=4_000)
    parser.add_argument("--mosaic-python", help="interpreter that has mosaicml-streaming")
    parser.add_argument("--large", type=float, metavar="GIB", help="also measure memory, on so many GiB of shards")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    from dist_gan.packing.pack import pack
    from dist_gan.packing.sources import open_source

    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}

    def add(title: str, rates: dict[str, list[float]]) -> None:
        for name, values in rates.items():
            rows.append({"row": f"{title}/{name}", "images_per_second": round(statistics.median(values))})
            if not options.json:
                print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_zips(options.cifar, work, images_32=50_000, images_256=options.images_256)
        for side, a_shard in ((32, 5_000), (256, 500)):
            pack(
                open_source(str(work / f"{side}.zip")), str(work / str(side)), samples_per_shard=a_shard, progress=False,
                say=lambda text: None,
            )  # fmt: skip
            for cores in (2, 1):
                where: dict[str, Any] = {"threads": cores, "core": 0 if cores == 1 else None}
                names = ["ours", "decoder", "webdataset", "webdataset-simplejpeg"]
                readers = {n: Reader(n, str(work / str(side)), side, **where) for n in names}
                if options.mosaic_python:
                    folder = str(work / str(side))
                    readers["mosaicml"] = Reader("mosaicml", folder, side, python=options.mosaic_python, **where)
                rates = compared(readers, rounds=options.rounds, seconds=options.seconds)
                title = f"{side}" if cores == 2 else f"{side}_one_core"
                add(title, rates)
                peers = [n for n in rates if n not in ("ours", "decoder")]
                summary[f"fraction_of_decoder_{title}"] = ratio(rates, "ours", ["decoder"])
                summary[f"times_webdataset_{title}"] = ratio(rates, "ours", ["webdataset"])
                summary[f"times_best_peer_{title}"] = ratio(rates, "ours", peers)
        serving = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert serving.stdout is not None
        port = int(serving.stdout.readline())
        for side in (256, 32):
            rates = compared(
                {
                    "local": Reader("ours", str(work / str(side)), side, threads=1, core=0),
                    "http": Reader("ours", f"http://127.0.0.1:{port}/{side}", side, threads=1, core=0),
                },
                rounds=options.rounds,
                seconds=options.seconds,
            )
            add(f"latency-{side}", rates)
            key = "fraction_with_latency" if side == 256 else f"fraction_with_latency_{side}"
            summary[key] = ratio(rates, "http", ["local"])
        serving.kill()
        summary["wait_share_of_100ms_steps_256"] = round(wait_share(str(work / "256")), 5)
        if options.large:
            summary |= large(work / "256.zip", work / "large", gib=options.large)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(json.dumps({
        "benchmark": "stream",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "python": sys.version.split()[0]},
        "peers": ["webdataset", "webdataset-simplejpeg"] + (["mosaicml"] if options.mosaic_python else []),
        "rows": rows,
        "summary": summary,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
