"""Prefetching from a store: several requests run at a time, and their results are returned in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from dist_gan import storage

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_REQUESTS = storage.CONNECTIONS
"""Largest number of simultaneous requests. At 50 ms each they allow 640 a second, more than the store clients of one
process achieve."""
MAX_PENDING = 64
"""Largest number of results that are waiting or being fetched, so that one slow request does not stop the others."""
MAX_PENDING_BYTES = 2**26
"""Largest total size of these results, in bytes; a larger item is fetched alone."""


def prefetch(
    get: Callable[[Item], Result], items: Iterable[Item], *, size: Callable[[Item], int], num_threads: int
) -> Generator[tuple[Item, Callable[[], Result]], None, None]:
    """Yields each item, in order, with a function that returns the result of `get(item)` or raises its exception.

    At most `MAX_PENDING` results of `MAX_PENDING_BYTES` are held at a time, from the start of their requests, in addition
    to the one that the caller is using. A caller that stops early must close the generator, which waits for the running
    requests.

    Args:
        get: called in a thread of the pool, or in the calling thread if `num_threads` is 1.
        items: iterated as results are needed.
        size: returns the size, in bytes, of the result for an item.
        num_threads: number of threads; with 1 each item is fetched only when its result is used.
    """
    if num_threads == 1:
        for item in items:
            yield item, partial(get, item)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dist-gan-fetch")
    try:
        held: deque[tuple[Item, Callable[[], Result]]] = deque()
        num_bytes = 0
        for item in items:
            while held and (len(held) >= MAX_PENDING or num_bytes + size(item) > MAX_PENDING_BYTES):
                num_bytes -= size(held[0][0])
                yield held.popleft()
            held.append((item, pool.submit(get, item).result))
            num_bytes += size(item)
        while held:
            yield held.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
