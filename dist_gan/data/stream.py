"""The endless stream of real images: shards in, batches on the device out; its state is one integer.

    places -> read -> decode -> batch          (a webdataset.DataPipeline, run ahead of need by one thread)

Which images a batch holds follows from (seed, draw) alone; a rank reads the slots it owns and nothing else is said
between ranks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch import Tensor

from dist_gan import images, storage
from dist_gan.config import DataOrder
from dist_gan.data.manifest import Manifest
from dist_gan.data.order import Order, held_out
from dist_gan.draws import Draws
from dist_gan.types import Batch, TrainingFailed, UserError, unit_range

Sample = dict[str, Any]


class Stream(Protocol):
    """Where the loop gets its real images from."""

    draw: int
    waited_s: float

    def next(self) -> Batch:
        """This rank's part of the next global batch."""
        ...

    def preview(self, count: int) -> Tensor:
        """The first images of the order, on the device, to be looked at."""
        ...

    def seek(self, draw: int) -> None:
        """The next batch will be this one."""
        ...

    def close(self) -> None:
        """Ends what runs ahead."""
        ...

    def values(self) -> dict[str, Any]:
        """Draws consumed, and the fingerprint of the order."""
        ...

    def load_values(self, values: dict[str, Any]) -> None:
        """Goes on where `values` was taken."""
        ...


class Scanned(NamedTuple):
    """This rank's part of a batch of a scan; the last one is padded."""

    images: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]
    mask: Tensor
    """Which rows are images, bool, B; the others repeat the first."""


class Decoded(NamedTuple):
    """A batch as it leaves the pipeline: bytes on the CPU."""

    images_BHWC: NDArray[np.uint8]
    labels: tuple[int, ...] | None
    keys: tuple[str, ...]


class Shards:
    """Random access to the images of a data set, a block of neighbours at a time. For one thread alone.

    Args:
        url: folder of the shards.
        manifest: what is in them.
        resolution: side that images are brought to, by the rules of packing.
        channels: 1 or 3.
        open_blocks: blocks kept in memory.
        decoded: images decoded so far, by shard and row; None keeps none.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        resolution: int,
        channels: int,
        open_blocks: int,
        decoded: dict[tuple[int, int], NDArray[np.uint8]] | None,
    ) -> None:
        self.url = url
        self.manifest = manifest
        self.resolution = resolution
        self.channels = channels
        self._open_blocks = open_blocks
        self._decoded = decoded
        self._blocks: OrderedDict[tuple[int, int, int], tuple[int, bytes]] = OrderedDict()

    def read(self, shard: int, row: int, *, rows: tuple[int, int]) -> Sample:
        """One image, as bytes or decoded; the neighbours `rows` = [first, last] of its shard are read with it."""
        entry = self.manifest.shards[shard]
        sample: Sample = {"__key__": entry.keys[row], "__url__": storage.join(self.url, entry.name)}
        if entry.labels is not None:
            sample["label"] = entry.labels[row]
        if self._decoded is not None:
            sample["place"] = (shard, row)
            if (shard, row) in self._decoded:
                return sample
        start, data = self._block(shard, *rows)
        offset = entry.offsets[row] - start
        sample["image"] = data[offset : offset + entry.sizes[row]]
        return sample

    def _block(self, shard: int, first: int, last: int) -> tuple[int, bytes]:
        key = (shard, first, last)
        found = self._blocks.get(key)
        if found is None:
            entry = self.manifest.shards[shard]
            start, end = entry.offsets[first], entry.offsets[last] + entry.sizes[last]
            url = storage.join(self.url, entry.name)
            try:
                data = storage.read(url, start, end)
            except OSError as error:
                raise TrainingFailed(f"cannot read {storage.redact(url)}: {storage.why(error)}") from error
            if len(data) != end - start:
                raise TrainingFailed(
                    f"{storage.redact(url)} ends early: bytes {start:,} to {end:,} were asked for and {len(data):,} "
                    f"came; run `dist-gan verify {storage.redact(self.url)}`"
                )
            found = self._blocks[key] = (start, data)
            while len(self._blocks) > self._open_blocks:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return found

    def decode(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Pipeline stage: bytes to uint8 HWC of the wanted size."""
        for sample in samples:
            if "image" in sample:
                sample["pixels"] = self._decode(sample)
                if self._decoded is not None:
                    self._decoded[sample["place"]] = sample["pixels"]
            else:
                assert self._decoded is not None
                sample["pixels"] = self._decoded[sample["place"]]
            yield sample

    def _decode(self, sample: Sample) -> NDArray[np.uint8]:
        name = f"{storage.redact(sample['__url__'])}: {sample['__key__']}"
        try:
            image = images.decode(sample.pop("image"), name=name)
            if image.shape != (self.resolution, self.resolution, self.channels):
                image = images.fit(image, resolution=self.resolution, channels=self.channels)
        except images.BadImage as error:
            raise TrainingFailed(
                f"{error}; run `dist-gan verify {storage.redact(self.url)}` to find all such images"
            ) from error
        return image


def batched(samples: Iterable[Sample], *, size: int) -> Iterator[Decoded]:
    """Pipeline stage: stacks `size` samples."""
    part: list[Sample] = []
    for sample in samples:
        part.append(sample)
        if len(part) == size:
            labels = tuple(s["label"] for s in part) if "label" in part[0] else None
            yield Decoded(np.stack([s["pixels"] for s in part]), labels, tuple(s["__key__"] for s in part))
            part = []
    assert not part


class ImageStream:
    """Endless batches from shards; see the module.

    Args:
        url: folder of the shards.
        manifest: what is in them.
        section: order and split.
        resolution: side of the networks' images.
        channels: their channels.
        classes: classes the networks are conditioned on; 0 leaves labels out.
        batch: images of a global batch.
        slots: places in it that this rank owns.
        draws: the run's random numbers, on the device that images go to.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        section: DataOrder,
        resolution: int,
        channels: int,
        classes: int,
        batch: int,
        slots: Tensor,
        draws: Draws,
    ) -> None:
        check_fit(url, manifest, resolution=resolution, channels=channels, classes=classes)
        self.draw = 0
        self.waited_s = 0.0
        self._section, self._batch, self._slots, self._draws = section, batch, slots, draws
        self._labelled = classes > 0
        self._held_out = [held_out(s.keys, share=section.holdout) for s in manifest.shards]
        self._rows = [np.flatnonzero(~mask) for mask in self._held_out]
        if sum(map(len, self._rows)) == 0:
            raise UserError(f"data.holdout: {section.holdout} leaves no image to train on; choose a smaller share")
        self._order = Order(
            [len(rows) for rows in self._rows], seed=draws.seed, lanes=section.lanes, block=section.block
        )
        lanes_here = -(-section.lanes * len(slots) // batch)
        fits = self._order.length * channels * resolution**2 <= section.cache
        self._new_reader = partial(
            Shards,
            url,
            manifest,
            resolution=resolution,
            channels=channels,
            open_blocks=2 * max(lanes_here, 1) + 8,
            decoded={} if fits else None,
        )
        self.fingerprint = (
            f"{manifest.fingerprint}/seed={draws.seed}/lanes={section.lanes}/block={section.block}"
            f"/holdout={section.holdout}/batch={batch}"
        )
        self._queue: Queue[Decoded | BaseException] = Queue(maxsize=section.prefetch)
        self._stop = Event()
        self._thread: Thread | None = None

    def next(self) -> Batch:
        """This rank's part of the next global batch, on the device."""
        if self._thread is None:
            self._start()
        began = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch = self._on_device(item, draw=self.draw)
        self.draw += 1
        return batch

    def preview(self, count: int) -> Tensor:
        """The first `count` images of the order, on the device."""
        shards = self._new_reader()
        samples = self._samples_at(np.arange(count), shards)
        return self._pixels(next(iter(batched(shards.decode(samples), size=count))))

    def seek(self, draw: int) -> None:
        """The next batch will be number `draw`; nothing is replayed."""
        self.close()
        self.draw = draw

    def close(self) -> None:
        """Ends the thread that runs ahead."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self._stop = Event()
        self._queue = Queue(maxsize=self._section.prefetch)

    def values(self) -> dict[str, Any]:
        """Draws consumed, and the fingerprint of the order."""
        return {"draw": self.draw, "fingerprint": self.fingerprint}

    def load_values(self, values: dict[str, Any]) -> None:
        """Goes on where `values` was taken; a different order is refused."""
        if values["fingerprint"] != self.fingerprint:
            raise UserError(
                f"data: the images or their order are not those of the checkpoint ({values['fingerprint']} there, "
                f"{self.fingerprint} here); give the same data and order, or another run.dir"
            )
        self.seek(int(values["draw"]))

    def scan(self, split: str, *, batch: int, rank: int, world_size: int) -> Iterator[Scanned]:
        """Every image of `train` or `holdout` once, in the order of the shards, dealt over the ranks.

        Every rank gets equally many batches of `batch` rows; what is missing at the end is padding.
        """
        assert split in ("train", "holdout")
        rows = [
            (shard, int(row))
            for shard, mask in enumerate(self._held_out)
            for row in np.flatnonzero(mask if split == "holdout" else ~mask)
        ]
        shards = self._new_reader(decoded=None)
        for start in range(0, len(rows), batch * world_size):
            mine = rows[start + rank : start + batch * world_size : world_size]
            padded = mine + [rows[start]] * (batch - len(mine))
            samples = (shards.read(shard, row, rows=(row, row)) for shard, row in padded)
            item = next(iter(batched(shards.decode(samples), size=batch)))
            mask = torch.arange(batch) < len(mine)
            yield Scanned(self._pixels(item), self._labels(item), item.keys[: len(mine)], mask.to(self._draws.device))

    def pipeline(self, draw: int) -> webdataset.DataPipeline:
        """Decoded batches from `draw` on."""
        shards = self._new_reader()
        return webdataset.DataPipeline(
            lambda: self._places(draw, shards),
            shards.decode,
            lambda samples: batched(samples, size=len(self._slots)),
        )

    def _places(self, draw: int, reader: Shards) -> Iterator[Sample]:
        slots = self._slots.numpy()
        while True:
            yield from self._samples_at(draw * self._batch + slots, reader)
            draw += 1

    def _samples_at(self, positions: NDArray[np.int64], reader: Shards) -> Iterator[Sample]:
        shards, indices, blocks = self._order.locate(positions)
        for shard, index, block in zip(shards.tolist(), indices.tolist(), blocks.tolist(), strict=True):
            rows = self._rows[shard]
            _, start, end = self._order.block_range(block)
            yield reader.read(shard, int(rows[index]), rows=(int(rows[start]), int(rows[end - 1])))

    def _start(self) -> None:
        pipeline, queue, stop = iter(self.pipeline(self.draw)), self._queue, self._stop

        def run_ahead() -> None:
            try:
                for item in pipeline:
                    if not _put(queue, item, stop):
                        return
            except BaseException as error:
                _put(queue, error, stop)

        self._thread = Thread(target=run_ahead, name="image-stream", daemon=True)
        self._thread.start()

    def _on_device(self, item: Decoded, *, draw: int) -> Batch:
        pixels = self._pixels(item)
        if self._section.flip:
            mirror = self._draws.uniform("flip", draw=draw, slots=self._slots) < 0.5
            pixels = torch.where(mirror.view(-1, 1, 1, 1), pixels.flip(3), pixels)
        return Batch(pixels, self._labels(item), self._slots, item.keys, draw)

    def _pixels(self, item: Decoded) -> Tensor:
        pixels = torch.from_numpy(item.images_BHWC).permute(0, 3, 1, 2)
        if self._draws.device.type == "cuda":
            pixels = pixels.pin_memory().to(self._draws.device, non_blocking=True)
        return unit_range(pixels, dtype=self._draws.dtype).contiguous()

    def _labels(self, item: Decoded) -> Tensor | None:
        if not self._labelled:
            return None
        assert item.labels is not None
        return torch.tensor(item.labels, device=self._draws.device)


def _put(queue: Queue[Any], item: Any, stop: Event) -> bool:
    """Puts an item as soon as there is room; False if asked to stop first."""
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.1)
        except Full:
            continue
        return True
    return False


def check_fit(url: str, manifest: Manifest, *, resolution: int, channels: int, classes: int) -> None:
    """Whether the networks can be trained on these shards.

    Raises:
        UserError: they cannot; one sentence a reason.
    """
    place, mistakes = storage.redact(url), []
    if manifest.resolution is not None and manifest.resolution < resolution:
        mistakes.append(
            f"networks.resolution: {resolution}, but the shards at {place} hold images of {manifest.resolution} pixels; "
            f"set networks.resolution={manifest.resolution}, or pack the originals with --resolution {resolution}"
        )
    if manifest.channels != channels:
        mistakes.append(
            f"networks.channels: {channels}, but the shards at {place} hold images of {manifest.channels}; "
            f"set networks.channels={manifest.channels}, or pack with --channels {channels}"
        )
    found = len(manifest.classes) if manifest.classes is not None else 0
    if classes and classes != found:
        mistakes.append(
            f"networks.classes: {classes}, but the shards at {place} have {found or 'no'} classes; "
            f"set networks.classes={found}"
        )
    if mistakes:
        raise UserError("\n".join(mistakes))
