"""Runs ahead of the training loop: one thread plans, some wait for the store, some decode, in bounded numbers.

Batches come in their order whatever order their parts were finished in. simplejpeg works outside of Python's lock, so
threads decode in parallel, and hand over nothing but an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import NamedTuple

import torch
import webdataset
from torch import Tensor

from dist_gan.data.decoding import Decoder, Pixels, Stage
from dist_gan.data.plan import Place, Plan
from dist_gan.types import TrainingFailed

_WORTH_A_THREAD = 2**20
"""Pixels from which on a part of a batch is handed to another thread. With less, threads wait for each other's turn in
the interpreter for longer than they decode: measured at 32x32, where one thread reads nearly twice as fast as two."""


class Decoded(NamedTuple):
    """A batch as it leaves the threads: bytes on the CPU."""

    images_BHWC: Tensor
    """uint8; pinned, for a GPU."""
    labels: tuple[int, ...]
    """-1 where the data have none."""
    keys: tuple[str, ...]


class _OnItsWay(NamedTuple):
    images_BHWC: Tensor
    parts: list[Future[tuple[list[int], list[str]]]]


def decode_part(
    decoder: Decoder, places: Sequence[Place], out: Pixels, stages: Sequence[Stage]
) -> tuple[list[int], list[str]]:
    """Fills `out` (NHWC) with the pixels of some places, by a `webdataset.DataPipeline`; labels and keys.

    Raises:
        TrainingFailed: as the decoder; or a user's stage gave too much, too little, or pictures of another shape.
    """
    rows = list(out)
    samples = decoder.samples(places, rows)
    labels, keys = [], []
    for count, sample in enumerate(webdataset.DataPipeline(lambda: samples, *stages) if stages else samples):
        if count == len(places):
            raise TrainingFailed("a stage gave more samples than it took; it must give one for each, in their order")
        pixels = sample["pixels"]
        if pixels is not rows[count]:
            if pixels.shape != out.shape[1:] or pixels.dtype != out.dtype:
                raise TrainingFailed(
                    f"a stage made of {sample['__key__']!r} {pixels.dtype} of the shape {pixels.shape}; it must be uint8 "
                    f"of the shape {out.shape[1:]}"
                )
            rows[count][...] = pixels
        labels.append(sample.get("label", -1))
        keys.append(sample["__key__"])
    if len(keys) != len(places):
        raise TrainingFailed("a stage gave fewer samples than it took; it must give one for each, in their order")
    return labels, keys


class Ahead:
    """Batches from a draw on, decoded before they are asked for.

    Args:
        plan: which images.
        decoder: of them; it is closed with this.
        draw: number of the first batch.
        shape: NHWC of a batch.
        stages: of the user.
        prefetch: batches that are on their way at a time.
        workers: threads that decode.
        pinned: whether the bytes are going to a GPU.
    """

    def __init__(
        self,
        plan: Plan,
        decoder: Decoder,
        *,
        draw: int,
        shape: tuple[int, ...],
        stages: Sequence[Stage],
        prefetch: int,
        workers: int,
        pinned: bool,
    ) -> None:
        self.decoder = decoder
        self._plan, self._shape, self._stages, self._pinned = plan, shape, tuple(stages), pinned
        self._part = max(-(-shape[0] // workers), -(-_WORTH_A_THREAD // (shape[1] * shape[2])))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._queue: Queue[_OnItsWay | BaseException] = Queue(maxsize=prefetch)
        self._stop = Event()
        self._is_first = True
        self._unused: list[Tensor] = []
        self._thread = Thread(target=self._run, args=(draw,), name="image-stream", daemon=True)
        self._thread.start()

    def take(self) -> Decoded:
        """The next batch, waited for.

        Raises:
            TrainingFailed: it cannot be had.
        """
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        labels: list[int] = []
        keys: list[str] = []
        for part in item.parts:
            some_labels, some_keys = part.result()
            labels += some_labels
            keys += some_keys
        return Decoded(item.images_BHWC, tuple(labels), tuple(keys))

    def give_back(self, images_BHWC: Tensor) -> None:
        """Takes a batch's memory for a later one: memory that was never touched takes longer to fill."""
        self._unused.append(images_BHWC)

    def has_next(self) -> bool:
        """Whether `take` would not wait."""
        try:
            item = self._queue.queue[0]
        except IndexError:
            return False
        return not isinstance(item, BaseException) and all(part.done() for part in item.parts)

    def close(self) -> None:
        """Ends the threads; what they were at is given up."""
        self._stop.set()
        self.decoder.reader.give_up()  # or a store that is away would be waited for
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                break
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)
        self.decoder.reader.close()

    def _run(self, draw: int) -> None:
        try:
            for number, places in self._plan.from_draw(draw):
                if not self._put(self._begun(number, places)):
                    return
        except BaseException as error:
            self._put(error)

    def _begun(self, draw: int, places: Sequence[Place]) -> _OnItsWay:
        if self._plan.looks_ahead_at(draw) or self._is_first:
            self.decoder.reader.want(dict.fromkeys(place.piece for place in places))
            self.decoder.reader.want(self._plan.ahead_of(draw))
            self._is_first = False
        new = not self._unused
        images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pinned) if new else self._unused.pop()
        pixels = images.numpy()
        if len(places) <= self._part:
            done: Future[tuple[list[int], list[str]]] = Future()
            done.set_result(decode_part(self.decoder, places, pixels, self._stages))
            return _OnItsWay(images, [done])
        parts = [
            self._pool.submit(
                decode_part, self.decoder, places[at : at + self._part], pixels[at : at + self._part], self._stages
            )
            for at in range(0, len(places), self._part)
        ]
        return _OnItsWay(images, parts)

    def _put(self, item: _OnItsWay | BaseException) -> bool:
        """Hands over as soon as there is room; False if asked to stop first."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except Full:
                continue
            return True
        return False
