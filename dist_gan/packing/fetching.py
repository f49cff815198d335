"""Fetches ahead: what is far away is asked for before its turn, so that many answers are under way at once."""

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
"""Requests under way: with 50 ms each they allow 640 a second, more than the clients of stores do in one process."""
MAX_PENDING = 64
"""Results that wait for their turn or are under way, so that one slow answer does not stop the others."""
MAX_PENDING_BYTES = 2**26
"""Bytes of the same; an item that is larger is fetched alone."""


def prefetch(
    get: Callable[[Item], Result], items: Iterable[Item], *, size: Callable[[Item], int], num_threads: int
) -> Generator[tuple[Item, Callable[[], Result]], None, None]:
    """Each item in order with a function that gives or raises what `get` made of it.

    Beside the one in the caller's hands no more than `MAX_PENDING` results and `MAX_PENDING_BYTES` are held, counted from the
    request on. Close the iterator if it is left early: it then waits for the requests that are under way.

    Args:
        get: is called in a thread, or in the caller where `num_threads` is 1.
        items: taken as needed.
        size: bytes that the result for an item takes.
        num_threads: threads; with 1 nothing is fetched before its turn.
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
