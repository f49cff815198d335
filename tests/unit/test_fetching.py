"""What is fetched ahead: in order, several at once, never more than the bound, and nothing after the end."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_gan.packing import fetching
from dist_gan.packing.fetching import MAX_PENDING, MAX_PENDING_BYTES, MAX_REQUESTS, prefetch


class Fetch:
    """Bytes that weigh nothing until they are there, and a count of what is alive."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.lock = threading.Lock()
        self.begun = self.at_once = self.most_at_once = 0

    def __call__(self, item: int) -> int:
        with self.lock:
            self.begun += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.seconds)
        with self.lock:
            self.at_once -= 1
        return item


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, MAX_PENDING_BYTES + 5), max_size=200))
def test_whatever_the_sizes_the_order_stays_and_no_more_than_the_bound_is_asked_for(sizes: list[int]) -> None:
    fetch = Fetch()
    taken = 0
    asked = prefetch(fetch, range(len(sizes)), size=sizes.__getitem__, num_threads=MAX_REQUESTS)
    for item, get in asked:
        assert item == get() == taken
        taken += 1
        begun = fetch.begun  # those that wait for a thread hold nothing yet
        held = sizes[taken:begun]
        assert len(held) <= MAX_PENDING
        assert sum(held) <= MAX_PENDING_BYTES or len(held) == 1
    assert taken == len(sizes)


def test_requests_are_under_way_together_so_latency_is_paid_once_for_many() -> None:
    fetch = Fetch(seconds=0.05)
    began = time.monotonic()
    assert [get() for _, get in prefetch(fetch, range(64), size=lambda _: 1, num_threads=MAX_REQUESTS)] == list(
        range(64)
    )
    assert fetch.most_at_once == MAX_REQUESTS
    assert time.monotonic() - began < 64 * 0.05 / 2


def test_with_one_at_once_nothing_is_fetched_before_its_turn_and_no_thread_is_made() -> None:
    here = threading.get_ident()
    asked = prefetch(lambda item: (item, threading.get_ident()), range(3), size=lambda _: 1, num_threads=1)
    assert [get() for _, get in asked] == [(n, here) for n in range(3)]


def test_an_error_belongs_to_its_item_and_the_others_come() -> None:
    def fetch(item: int) -> int:
        if item == 1:
            raise KeyError(item)
        return item

    found = []
    for item, get in prefetch(fetch, range(3), size=lambda _: 1, num_threads=2):
        if item == 1:
            with pytest.raises(KeyError):
                get()
        else:
            found.append(get())
    assert found == [0, 2]


def test_who_leaves_early_leaves_no_thread_and_no_request() -> None:
    before = threading.active_count()
    fetch = Fetch(seconds=0.01)
    with closing(prefetch(fetch, range(1000), size=lambda _: 1, num_threads=MAX_REQUESTS)) as asked:
        next(asked)
    begun = fetch.begun
    time.sleep(0.05)
    assert fetch.begun == begun <= MAX_PENDING
    assert threading.active_count() == before


def test_results_are_let_go_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_PENDING_BYTES", 10)
    alive: set[int] = set()

    class Heavy:
        def __init__(self, item: int) -> None:
            alive.add(item)
            self.item = item

        def __del__(self) -> None:
            alive.discard(self.item)

    most = 0
    for _, get in prefetch(Heavy, range(100), size=lambda _: 5, num_threads=4):
        get()
        most = max(most, len(alive))
    assert most <= 2 + 1, "two fit into the bound, and one is in our hands"
