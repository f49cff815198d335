"""Endless stream of batches of real images, from shards to the device; its position is one integer.

    plan -> pieces, prefetched -> decoder -> the user's stages -> batch on the device

The images of a batch are a function of the seed and the number of the batch (`draw`). Each rank reads the images at the
positions of the global batch that it owns (its slots), and ranks need not communicate.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_gan.config import DataOrder, ShardsData
from dist_gan.data.checks import check_fit
from dist_gan.data.decoding import Damage, Decoder, Stage
from dist_gan.data.disk_cache import DiskCache
from dist_gan.data.order import Integers
from dist_gan.data.pieces import Piece, PieceReader, ShardFolder
from dist_gan.data.pixel_cache import PixelCache
from dist_gan.data.plan import ImageAddress, Plan
from dist_gan.data.prefetch import Prefetcher, decode_part
from dist_gan.draws import Draws
from dist_gan.types import Batch, TrainingFailed, UserError, unit_range


class ScanBatch(NamedTuple):
    """This rank's part of a batch while a split is read once; the last batch is padded to full length."""

    images: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]
    mask: Tensor
    """True for rows that are images of the split, bool, shape (B,); other rows repeat the first image of the batch."""


class _DeviceBatch(NamedTuple):
    """This rank's part of a global batch, on the device or being copied to the device."""

    images_BCHW: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]
    sent: torch.cuda.Event | None
    """CUDA event of the copying stream, reached once the copy is complete; None on a CPU."""


class ImageStream:
    """Endless stream of batches of images from shards.

    Args:
        folders: folders of shards with their mixing weights.
        section: settings of the order, of the split, and of reading.
        resolution: side of the networks' images, in pixels.
        channels: channels of the networks' images.
        classes: number of classes that the networks are conditioned on; 0 leaves labels out.
        batch: number of images of a global batch.
        slots: positions in the global batch that this rank owns, int64.
        draws: the run's random numbers, on the device that images go to.
        stages: a user's own steps after decoding.

    Attributes:
        most_bytes: the largest number of bytes of image files held at a time.

    Raises:
        UserError: the networks cannot be trained on these images.
    """

    def __init__(
        self,
        folders: Sequence[tuple[ShardFolder, int]],
        *,
        section: DataOrder,
        resolution: int,
        channels: int,
        classes: int,
        batch: int,
        slots: Tensor,
        draws: Draws,
        stages: Sequence[Stage] = (),
    ) -> None:
        self._folders = tuple(folder for folder, _ in folders)
        for folder in self._folders:
            check_fit(folder.url, folder.manifest, resolution=resolution, channels=channels, classes=classes)
        self.draw = 0
        self.waited_s = 0.0
        self.most_bytes = 0
        self._past_retries = 0
        self._section, self._slots, self._draws, self._stages = section, slots, draws, tuple(stages)
        self._shape, self._labelled = (resolution, resolution, channels), classes > 0
        self._plan = Plan(folders, section=section, seed=draws.seed, batch=batch, slots=slots.numpy())
        num_images = sum(folder.manifest.num_samples for folder in self._folders)
        fits = num_images * channels * resolution**2 <= section.cache
        self._pixel_cache = PixelCache(self._folders, shape=self._shape) if fits else None
        self._disk: DiskCache | None = None
        self._patience_s: float | None = None
        if isinstance(section, ShardsData):
            self._patience_s = section.patience_s
            if section.disk_cache:
                self._disk = DiskCache(section.disk_cache, limit=section.disk_cache_bytes)
        self._damage: set[tuple[str, str]] = set()
        self._found: list[Damage] = []
        names = ",".join(getattr(stage, "__qualname__", type(stage).__qualname__) for stage in stages)
        self.fingerprint = (
            f"{'+'.join(f'{weight}*{folder.manifest.fingerprint}' for folder, weight in folders)}/seed={draws.seed}"
            f"/lanes={section.lanes}/block={section.block}/holdout={section.holdout}/balance={section.balance}"
            f"/stages={names}/batch={batch}"
        )
        self._prefetcher: Prefetcher | None = None
        self._staged: _DeviceBatch | None = None
        self._side = torch.cuda.Stream(draws.device) if draws.device.type == "cuda" else None

    @property
    def retries(self) -> int:
        """Number of requests to the store that this rank had to repeat."""
        return self._past_retries + (self._prefetcher.decoder.reader.retries if self._prefetcher is not None else 0)

    @property
    def num_damaged(self) -> int:
        """Number of images known to be damaged, over all ranks."""
        return len(self._damage)

    # -- batches --------------------------------------------------------------------------------------------------

    def next(self) -> Batch:
        """Returns this rank's part of the next global batch, on the device.

        Raises:
            TrainingFailed: the store does not answer, or an image is damaged and may not be substituted.
        """
        if self._prefetcher is None:
            self._prefetcher = self._start()
        try:
            if self._staged is None:
                began = time.perf_counter()
                self._staged = self._send(self._prefetcher)
                self.waited_s += time.perf_counter() - began
            batch = self._receive(self._staged)
            # The following batch, if already decoded, is copied while the networks compute.
            self._staged = (
                self._send(self._prefetcher) if self._side is not None and self._prefetcher.has_next() else None
            )
        except BaseException:
            self.close()
            raise
        self.draw += 1
        return batch

    def preview(self, count: int) -> Tensor:
        """Returns the first `count` images of the order, on the device."""
        decoder = self._decoder()
        try:
            return self._decode(decoder, self._plan.addresses(np.arange(count)))[0]
        finally:
            self._release(decoder)

    def seek(self, draw: int) -> None:
        """Makes global batch number `draw` the next batch, without reading earlier batches."""
        self.close()
        self.draw = draw

    def close(self) -> None:
        """Ends the threads that prefetch batches."""
        if self._prefetcher is not None:
            prefetcher, self._prefetcher = self._prefetcher, None
            prefetcher.close()
            self._release(prefetcher.decoder)
        self._staged = None

    # -- damage ---------------------------------------------------------------------------------------------------

    def damaged(self) -> list[Damage]:
        """Returns the images that this rank has found damaged since the last call."""
        found, self._found = self._found, []
        return found + (self._prefetcher.decoder.damaged() if self._prefetcher is not None else [])

    def note_damaged(self, found: Iterable[Damage]) -> list[Damage]:
        """Counts the damaged images that all ranks have found; returns those that were not counted before.

        Raises:
            TrainingFailed: more images are damaged than may be substituted (`data.max_bad`).
        """
        new = {item[:2]: item for item in found if item[:2] not in self._damage}
        self._damage |= new.keys()
        limit = max(1, int(self._section.max_bad * self._plan.length))
        if len(self._damage) > limit:
            raise TrainingFailed(
                f"{len(self._damage):,} of {self._plan.length:,} images are damaged, and data.max_bad={self._section.max_bad:g} "
                f"allows {limit:,}; run `dist-gan verify` on the shards, and copy or pack them again:",
                *(f"- {item.url}: {item.key}: {item.reason}" for item in list(new.values())[:5]),
            )
        return list(new.values())

    # -- state ----------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """Returns, for the checkpoint, the number of batches consumed, the order's fingerprint and the damaged images."""
        return {"draw": self.draw, "fingerprint": self.fingerprint, "damaged": sorted(map(list, self._damage))}

    def load_values(self, values: dict[str, Any]) -> None:
        """Continues from the state that `values` returned. Raises UserError if the state is of another order."""
        if values["fingerprint"] != self.fingerprint:
            raise UserError(
                f"data: the images or their order are not those of the checkpoint ({values['fingerprint']} there, "
                f"{self.fingerprint} here); give the same data and order, or another run.dir"
            )
        self._damage = {(url, key) for url, key in values["damaged"]}
        self.seek(int(values["draw"]))

    # -- a split from end to end ----------------------------------------------------------------------------------

    def scan(self, split: str, *, batch: int, rank: int, world_size: int) -> Iterator[ScanBatch]:
        """Yields every image of the split `train` or `holdout` once, in the order of the shards, divided over the
        ranks.

        Every rank gets the same number of batches of `batch` rows; the last batches are padded.
        """
        assert split in ("train", "holdout")
        chosen = self._plan.holdout_rows if split == "holdout" else self._plan.rows
        rows = [
            (folder, shard, int(row))
            for folder, shards in enumerate(chosen)
            for shard, some in enumerate(shards)
            for row in some
        ]
        decoder = self._decoder(rows=chosen)
        try:
            for start in range(0, len(rows), batch * world_size):
                mine = rows[start + rank * batch : start + (rank + 1) * batch]
                padded = mine + [rows[start]] * (batch - len(mine))
                addresses = [ImageAddress(*where, Piece(where[0], where[1], where[2], where[2])) for where in padded]
                decoder.reader.request(address.piece for address in addresses)
                images, labels, keys = self._decode(decoder, addresses)
                mask = (torch.arange(batch) < len(mine)).to(self._draws.device)
                yield ScanBatch(images, labels, keys[: len(mine)], mask)
        finally:
            self._release(decoder)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _start(self) -> Prefetcher:
        return Prefetcher(
            self._plan,
            self._decoder(cache=self._pixel_cache),
            draw=self.draw,
            shape=(len(self._slots), *self._shape),
            stages=self._stages,
            prefetch=self._section.prefetch,
            workers=self._section.workers,
            pinned=self._side is not None,
        )

    def _decoder(self, *, rows: Sequence[Sequence[Integers]] | None = None, cache: PixelCache | None = None) -> Decoder:
        reader = PieceReader(
            self._folders,
            memory=self._plan.memory,
            patience_s=self._patience_s,
            cache=self._disk,
        )
        return Decoder(
            self._folders,
            reader,
            rows=self._plan.rows if rows is None else rows,
            shape=self._shape,
            substitute=self._section.bad_images == "substitute",
            cache=cache,
        )

    def _release(self, decoder: Decoder) -> None:
        decoder.reader.close()
        self._found += decoder.damaged()
        self._past_retries += decoder.reader.retries
        self.most_bytes = max(self.most_bytes, decoder.reader.most_bytes)

    def _decode(
        self, decoder: Decoder, addresses: Sequence[ImageAddress]
    ) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        pixels = torch.empty((len(addresses), *self._shape), dtype=torch.uint8)
        labels, keys = decode_part(decoder, addresses, pixels.numpy(), self._stages)
        images = self._as_input(pixels.to(self._draws.device).permute(0, 3, 1, 2))
        return images, self._labels(labels), tuple(keys)

    def _send(self, prefetcher: Prefetcher) -> _DeviceBatch:
        """Takes the next decoded batch, and starts its copy to the device on a CUDA stream of its own."""
        item = prefetcher.take()
        if self._side is None:
            return _DeviceBatch(item.images_BHWC.permute(0, 3, 1, 2), self._labels(item.labels), item.keys, None)
        with torch.cuda.stream(self._side):
            images = item.images_BHWC.to(self._draws.device, non_blocking=True)
            labels = self._labels(item.labels)
            sent = torch.cuda.Event()
            sent.record(self._side)
        return _DeviceBatch(images.permute(0, 3, 1, 2), labels, item.keys, sent)

    def _receive(self, item: _DeviceBatch) -> Batch:
        """Waits for the copy that `_send` has started, and returns the batch as input of the networks."""
        if item.sent is not None:
            now = torch.cuda.current_stream(self._draws.device)
            now.wait_event(item.sent)
            for tensor in (item.images_BCHW, item.labels):
                if tensor is not None:
                    tensor.record_stream(now)
        images = self._as_input(item.images_BCHW)
        if item.sent is None and self._prefetcher is not None:  # torch reuses pinned memory itself
            self._prefetcher.give_back(item.images_BCHW.permute(0, 2, 3, 1))
        if self._section.flip:
            mirror = self._draws.uniform("flip", draw=self.draw, slots=self._slots) < 0.5
            images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(3), images)
        return Batch(images, item.labels, self._slots, item.keys, self.draw)

    def _as_input(self, images_BCHW: Tensor) -> Tensor:
        return unit_range(images_BCHW, dtype=self._draws.dtype).contiguous()

    def _labels(self, labels: Sequence[int]) -> Tensor | None:
        if not self._labelled:
            return None
        held = torch.tensor(labels)
        if self._side is not None:
            held = held.pin_memory()
        return held.to(self._draws.device, non_blocking=True)
