"""The endless stream of real images: shards in, batches on the device out; its state is one integer.

    plan -> pieces, read ahead of need -> decode -> your own stages -> batch on the device

Which images a batch holds follows from (seed, draw) alone; a rank reads the slots it owns and nothing else is said
between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_gan import storage
from dist_gan.config import DataOrder, ShardsData
from dist_gan.data.decoding import Damage, Decoder, Kept, Stage
from dist_gan.data.disk_cache import DiskCache
from dist_gan.data.manifest import Manifest
from dist_gan.data.order import Integers
from dist_gan.data.pieces import Piece, PieceReader, Source
from dist_gan.data.plan import Place, Plan
from dist_gan.data.prefetch import Ahead, decode_part
from dist_gan.draws import Draws
from dist_gan.types import Batch, TrainingFailed, UserError, unit_range


class Stream(Protocol):
    """Where the loop gets its real images from."""

    draw: int
    waited_s: float

    @property
    def retries(self) -> int:
        """Requests to the store that this rank had to make again."""
        ...

    @property
    def num_damaged(self) -> int:
        """Images known to be damaged, over all ranks."""
        ...

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

    def damaged(self) -> list[Damage]:
        """Images that this rank found damaged since the last call."""
        ...

    def note_damaged(self, found: Iterable[Damage]) -> list[Damage]:
        """Counts what the ranks have found, and gives what is new; the same on all ranks.

        Raises:
            TrainingFailed: there is more than may be substituted.
        """
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


class _OnDevice(NamedTuple):
    """A batch whose bytes are on the device, or on their way there."""

    images_BCHW: Tensor
    labels: Tensor | None
    keys: tuple[str, ...]
    sent: torch.cuda.Event | None
    """Reached on the side stream once they have arrived."""


class ImageStream:
    """Endless batches from shards; see the module.

    Args:
        sources: folders of shards with their weights.
        section: order, split, and how it is read.
        resolution: side of the networks' images.
        channels: their channels.
        classes: classes the networks are conditioned on; 0 leaves labels out.
        batch: images of a global batch.
        slots: places in it that this rank owns.
        draws: the run's random numbers, on the device that images go to.
        stages: a user's own steps after decoding.

    Attributes:
        most_bytes: the most bytes of image files that were held at a time.

    Raises:
        UserError: the networks cannot be trained on these images.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, int]],
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
        self._sources = tuple(source for source, _ in sources)
        for source in self._sources:
            check_fit(source.url, source.manifest, resolution=resolution, channels=channels, classes=classes)
        self.draw = 0
        self.waited_s = 0.0
        self.most_bytes = 0
        self._past_retries = 0
        self._section, self._slots, self._draws, self._stages = section, slots, draws, tuple(stages)
        self._shape, self._labelled = (resolution, resolution, channels), classes > 0
        self._plan = Plan(sources, section=section, seed=draws.seed, batch=batch, slots=slots.numpy())
        num_images = sum(source.manifest.num_samples for source in self._sources)
        fits = num_images * channels * resolution**2 <= section.cache
        self._kept = Kept(self._sources, shape=self._shape) if fits else None
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
            f"{'+'.join(f'{weight}*{source.manifest.fingerprint}' for source, weight in sources)}/seed={draws.seed}"
            f"/lanes={section.lanes}/block={section.block}/holdout={section.holdout}/balance={section.balance}"
            f"/stages={names}/batch={batch}"
        )
        self._ahead: Ahead | None = None
        self._staged: _OnDevice | None = None
        self._side = torch.cuda.Stream(draws.device) if draws.device.type == "cuda" else None

    @property
    def retries(self) -> int:
        """Requests to the store that this rank had to make again."""
        return self._past_retries + (self._ahead.decoder.reader.retries if self._ahead is not None else 0)

    @property
    def num_damaged(self) -> int:
        """Images known to be damaged, over all ranks."""
        return len(self._damage)

    # -- batches --------------------------------------------------------------------------------------------------

    def next(self) -> Batch:
        """This rank's part of the next global batch, on the device.

        Raises:
            TrainingFailed: the store does not give the images, or one is damaged and may not be substituted.
        """
        if self._ahead is None:
            self._ahead = self._start()
        try:
            if self._staged is None:
                began = time.perf_counter()
                self._staged = self._send(self._ahead)
                self.waited_s += time.perf_counter() - began
            batch = self._arrived(self._staged)
            # The one after it sets out now, if it is decoded, and arrives while the networks are busy.
            self._staged = self._send(self._ahead) if self._side is not None and self._ahead.has_next() else None
        except BaseException:
            self.close()
            raise
        self.draw += 1
        return batch

    def preview(self, count: int) -> Tensor:
        """The first `count` images of the order, on the device."""
        decoder = self._decoder()
        try:
            return self._decoded(decoder, self._plan.places(np.arange(count)))[0]
        finally:
            self._let_go(decoder)

    def seek(self, draw: int) -> None:
        """The next batch will be number `draw`; nothing is replayed."""
        self.close()
        self.draw = draw

    def close(self) -> None:
        """Ends the threads that run ahead."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.close()
            self._let_go(ahead.decoder)
        self._staged = None

    # -- damage ---------------------------------------------------------------------------------------------------

    def damaged(self) -> list[Damage]:
        """Images that this rank found damaged since the last call."""
        found, self._found = self._found, []
        return found + (self._ahead.decoder.damaged() if self._ahead is not None else [])

    def note_damaged(self, found: Iterable[Damage]) -> list[Damage]:
        """Counts what the ranks have found, and gives what is new.

        Raises:
            TrainingFailed: there is more than may be substituted (`data.max_bad`).
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
        """Draws consumed, the fingerprint of the order, and which images are known to be damaged."""
        return {"draw": self.draw, "fingerprint": self.fingerprint, "damaged": sorted(map(list, self._damage))}

    def load_values(self, values: dict[str, Any]) -> None:
        """Goes on where `values` was taken; a different order is refused."""
        if values["fingerprint"] != self.fingerprint:
            raise UserError(
                f"data: the images or their order are not those of the checkpoint ({values['fingerprint']} there, "
                f"{self.fingerprint} here); give the same data and order, or another run.dir"
            )
        self._damage = {(url, key) for url, key in values["damaged"]}
        self.seek(int(values["draw"]))

    # -- a split from end to end ----------------------------------------------------------------------------------

    def scan(self, split: str, *, batch: int, rank: int, world_size: int) -> Iterator[Scanned]:
        """Every image of `train` or `holdout` once, in the order of the shards, dealt over the ranks.

        Every rank gets equally many batches of `batch` rows; what is missing at the end is padding.
        """
        assert split in ("train", "holdout")
        chosen = self._plan.held_out if split == "holdout" else self._plan.rows
        rows = [
            (source, shard, int(row))
            for source, shards in enumerate(chosen)
            for shard, some in enumerate(shards)
            for row in some
        ]
        decoder = self._decoder(rows=chosen)
        try:
            for start in range(0, len(rows), batch * world_size):
                mine = rows[start + rank * batch : start + (rank + 1) * batch]
                padded = mine + [rows[start]] * (batch - len(mine))
                places = [Place(*where, Piece(where[0], where[1], where[2], where[2])) for where in padded]
                decoder.reader.want(place.piece for place in places)
                images, labels, keys = self._decoded(decoder, places)
                mask = (torch.arange(batch) < len(mine)).to(self._draws.device)
                yield Scanned(images, labels, keys[: len(mine)], mask)
        finally:
            self._let_go(decoder)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _start(self) -> Ahead:
        return Ahead(
            self._plan,
            self._decoder(kept=self._kept),
            draw=self.draw,
            shape=(len(self._slots), *self._shape),
            stages=self._stages,
            prefetch=self._section.prefetch,
            workers=self._section.workers,
            pinned=self._side is not None,
        )

    def _decoder(self, *, rows: Sequence[Sequence[Integers]] | None = None, kept: Kept | None = None) -> Decoder:
        reader = PieceReader(
            self._sources,
            memory=self._plan.memory,
            patience_s=self._patience_s,
            cache=self._disk,
        )
        return Decoder(
            self._sources,
            reader,
            rows=self._plan.rows if rows is None else rows,
            shape=self._shape,
            substitute=self._section.bad_images == "substitute",
            kept=kept,
        )

    def _let_go(self, decoder: Decoder) -> None:
        decoder.reader.close()
        self._found += decoder.damaged()
        self._past_retries += decoder.reader.retries
        self.most_bytes = max(self.most_bytes, decoder.reader.most_bytes)

    def _decoded(self, decoder: Decoder, places: Sequence[Place]) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        pixels = torch.empty((len(places), *self._shape), dtype=torch.uint8)
        labels, keys = decode_part(decoder, places, pixels.numpy(), self._stages)
        images = self._as_input(pixels.to(self._draws.device).permute(0, 3, 1, 2))
        return images, self._labels(labels), tuple(keys)

    def _send(self, ahead: Ahead) -> _OnDevice:
        """The next batch, its bytes on their way to the device by a stream of their own."""
        item = ahead.take()
        if self._side is None:
            return _OnDevice(item.images_BHWC.permute(0, 3, 1, 2), self._labels(item.labels), item.keys, None)
        with torch.cuda.stream(self._side):
            images = item.images_BHWC.to(self._draws.device, non_blocking=True)
            labels = self._labels(item.labels)
            sent = torch.cuda.Event()
            sent.record(self._side)
        return _OnDevice(images.permute(0, 3, 1, 2), labels, item.keys, sent)

    def _arrived(self, item: _OnDevice) -> Batch:
        if item.sent is not None:
            now = torch.cuda.current_stream(self._draws.device)
            now.wait_event(item.sent)
            for tensor in (item.images_BCHW, item.labels):
                if tensor is not None:
                    tensor.record_stream(now)
        images = self._as_input(item.images_BCHW)
        if item.sent is None and self._ahead is not None:  # pinned memory goes around by itself
            self._ahead.give_back(item.images_BCHW.permute(0, 2, 3, 1))
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
        raise UserError(*mistakes)
