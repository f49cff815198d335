"""Reads and decodes batches in threads before the training loop needs them.

One thread computes which images a batch holds, a pool of threads reads from the store, and another pool decodes. Batches
are returned in order, whatever the order in which their parts are finished. simplejpeg releases Python's interpreter
lock, so that threads decode in parallel.
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

from dist_gan.data.decoding import Decoder, Stage
from dist_gan.data.plan import ImageAddress, Plan
from dist_gan.pictures import Pixels
from dist_gan.types import TrainingFailed

_WORTH_A_THREAD = 2**20
"""Smallest number of pixels that are decoded in a thread of their own.

For smaller parts of a batch, waiting for the interpreter lock takes longer than decoding: at 32x32 one thread is nearly
twice as fast as two.
"""


class DecodedBatch(NamedTuple):
    """This rank's part of a global batch after decoding, in CPU memory."""

    images_BHWC: Tensor
    """Pixels, uint8; in pinned memory if the batch is to be copied to a GPU."""
    labels: tuple[int, ...]
    """Class of each image, as an index; -1 if the data have no labels."""
    keys: tuple[str, ...]


class _PendingBatch(NamedTuple):
    """This rank's part of a global batch, while threads decode its images."""

    images_BHWC: Tensor
    parts: list[Future[tuple[list[int], list[str]]]]


def decode_part(
    decoder: Decoder, addresses: Sequence[ImageAddress], out: Pixels, stages: Sequence[Stage]
) -> tuple[list[int], list[str]]:
    """Decodes the images at some addresses into `out`, NHWC; returns the labels and keys of the images.

    The user's stages (steps after decoding) are run as a `webdataset.DataPipeline`.

    Raises:
        TrainingFailed: as in `Decoder.samples`; or a user's stage gave too many samples, too few, or another shape.
    """
    rows = list(out)
    samples = decoder.samples(addresses, rows)
    labels, keys = [], []
    for count, sample in enumerate(webdataset.DataPipeline(lambda: samples, *stages) if stages else samples):
        if count == len(addresses):
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
    if len(keys) != len(addresses):
        raise TrainingFailed("a stage gave fewer samples than it took; it must give one for each, in their order")
    return labels, keys


class Prefetcher:
    """Reads and decodes the global batches from number `draw` on, before the training loop needs them.

    Args:
        plan: addresses of the images of each batch.
        decoder: decodes the images; `close` closes the reader of the decoder.
        draw: number of the first batch.
        shape: NHWC of this rank's part of a batch.
        stages: steps of the user after decoding.
        prefetch: largest number of batches that are being decoded, or are decoded and not yet taken.
        workers: number of threads that decode.
        pinned: allocates pinned memory, from which a GPU copies without waiting.
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
        self._queue: Queue[_PendingBatch | BaseException] = Queue(maxsize=prefetch)
        self._stop = Event()
        self._is_first = True
        self._unused: list[Tensor] = []
        self._thread = Thread(target=self._run, args=(draw,), name="image-stream", daemon=True)
        self._thread.start()

    def take(self) -> DecodedBatch:
        """Waits until the next batch is decoded, and returns the batch.

        Raises:
            TrainingFailed: the store does not answer, an image has no substitute, or a user's stage is wrong.
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
        return DecodedBatch(item.images_BHWC, tuple(labels), tuple(keys))

    def give_back(self, images_BHWC: Tensor) -> None:
        """Keeps the memory of a used batch for a later batch, because filling newly allocated memory takes longer."""
        self._unused.append(images_BHWC)

    def has_next(self) -> bool:
        """Returns whether the next batch is decoded, so that `take` returns at once."""
        try:
            item = self._queue.queue[0]
        except IndexError:
            return False
        return not isinstance(item, BaseException) and all(part.done() for part in item.parts)

    def close(self) -> None:
        """Ends the threads, and drops the batches that the threads are decoding."""
        self._stop.set()
        self.decoder.reader.stop_retrying()  # otherwise a request to a store that does not answer would delay the end
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
            for number, addresses in self._plan.from_draw(draw):
                if not self._put(self._begin(number, addresses)):
                    return
        except BaseException as error:
            self._put(error)

    def _begin(self, draw: int, addresses: Sequence[ImageAddress]) -> _PendingBatch:
        if self._plan.prefetches_at(draw) or self._is_first:
            self.decoder.reader.request(dict.fromkeys(address.piece for address in addresses))
            self.decoder.reader.request(self._plan.pieces_to_prefetch(draw))
            self._is_first = False
        new = not self._unused
        images = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._pinned) if new else self._unused.pop()
        pixels = images.numpy()
        if len(addresses) <= self._part:
            done: Future[tuple[list[int], list[str]]] = Future()
            done.set_result(decode_part(self.decoder, addresses, pixels, self._stages))
            return _PendingBatch(images, [done])
        parts = [
            self._pool.submit(
                decode_part, self.decoder, addresses[at : at + self._part], pixels[at : at + self._part], self._stages
            )
            for at in range(0, len(addresses), self._part)
        ]
        return _PendingBatch(images, parts)

    def _put(self, item: _PendingBatch | BaseException) -> bool:
        """Puts an item into the queue as soon as the queue has room; returns False if `close` is called first."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except Full:
                continue
            return True
        return False
