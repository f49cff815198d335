"""One reader of benchmarks/stream.py: reads for as long as it is told to on standard input, and says how many images came.

python benchmarks/stream_worker.py ours|decoder|webdataset|webdataset-simplejpeg|mosaicml FOLDER SIDE BATCH THREADS
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def ours(folder: str, side: int, batch: int, threads: int) -> Iterator[int]:
    """Our stream, nothing kept decoded, up to the uint8 batch that goes to the device."""
    import torch

    from dist_gan.config import ShardsData
    from dist_gan.data import ImageStream, ShardFolder
    from dist_gan.data.manifest import read_manifest
    from dist_gan.draws import Draws

    section = ShardsData(url=folder, cache=0, workers=threads)
    stream = ImageStream(
        [(ShardFolder(folder, read_manifest(folder)), 1)],
        section=section,
        resolution=side,
        channels=3,
        classes=0,
        batch=batch,
        slots=torch.arange(batch),
        draws=Draws(0),
    )
    ahead = stream._start()
    while True:
        images = ahead.take().images_BHWC
        yield len(images)
        ahead.give_back(images)


def decoder(folder: str, side: int, batch: int, threads: int) -> Iterator[int]:
    """simplejpeg and nothing else, over JPEG files in memory: what no reader can beat."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import simplejpeg

    with zipfile.ZipFile(Path(folder).with_suffix(".zip")) as archive:
        files = [archive.read(name) for name in archive.namelist()[:4096]]
    out = np.empty((threads, batch, side, side, 3), np.uint8)

    def some(thread: int, start: int) -> int:
        for row in range(batch):
            simplejpeg.decode_jpeg(files[(start + row) % len(files)], buffer=out[thread, row])
        return batch

    with ThreadPoolExecutor(threads) as pool:
        start = 0
        while True:
            tasks = [pool.submit(some, thread, start + thread * batch) for thread in range(threads)]
            start += threads * batch
            yield sum(task.result() for task in tasks)


def webdataset(folder: str, side: int, batch: int, threads: int, *, fast: bool = False) -> Iterator[int]:
    """webdataset's documented pipeline; with `fast`, its decoder replaced by simplejpeg."""
    import simplejpeg
    import webdataset as wds

    def simple(key: str, data: bytes) -> Any:
        return simplejpeg.decode_jpeg(data) if key.endswith(".jpg") else None

    urls = sorted(str(path) for path in Path(folder).glob("*.tar"))
    dataset = (
        wds.WebDataset(urls, shardshuffle=False, resampled=True)
        .shuffle(1000)
        .decode(simple if fast else "rgb8")
        .to_tuple("jpg", "cls")
        .batched(batch)
    )
    for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=threads):
        yield len(images)


def mosaicml(folder: str, side: int, batch: int, threads: int) -> Iterator[int]:
    """mosaicml-streaming in its own format, JPEG bytes decoded by simplejpeg."""
    import simplejpeg
    import torch
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    place = Path(folder).with_name(Path(folder).name + "-mds")
    if not place.exists():
        archive = zipfile.ZipFile(Path(folder).with_suffix(".zip"))
        with archive, MDSWriter(out=str(place), columns={"jpg": "bytes", "cls": "int"}) as writer:
            for name in archive.namelist():
                writer.write({"jpg": archive.read(name), "cls": int(name.split("/")[0])})

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[Any, int]:
            item = super().__getitem__(index)
            return torch.from_numpy(simplejpeg.decode_jpeg(item["jpg"])), item["cls"]

    dataset = Images(local=str(place), shuffle=True, batch_size=batch)
    while True:
        for images, _ in DataLoader(dataset, batch_size=batch, num_workers=threads):
            yield len(images)


def main() -> None:
    name, folder, side, batch, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    readers = {
        "ours": ours,
        "decoder": decoder,
        "webdataset": webdataset,
        "webdataset-simplejpeg": lambda *args: webdataset(*args, fast=True),
        "mosaicml": mosaicml,
    }
    # What the libraries print is not for the line that is read.
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), io.StringIO()
    batches = readers[name](folder, side, batch, threads)
    for _ in range(8):
        next(batches)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        seconds, images, began = float(line), 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            images += next(batches)
        print(json.dumps({"images": images, "seconds": time.perf_counter() - began}), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
