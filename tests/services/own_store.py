"""An object store in a dictionary, behind fsspec, that fails as a test tells it to; and a clock that waiting moves."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _registry


class Store:
    """What is kept, what was asked, and what is to go wrong. Its URLs begin with `gs://`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[Any, ...]] = []
        """("read", path, start, end), ("write", path), ("size", path), ("list", path) or ("remove", path)."""
        self.on_read: Callable[[str, int, int, bytes], bytes] = lambda path, start, end, data: data
        self.on_write: Callable[[str, bytes], bytes] = lambda path, data: data
        self.on_list: Callable[[str], None] = lambda path: None

    def names(self, folder: str) -> list[str]:
        """Of the objects in a folder."""
        return sorted(path.removeprefix(f"{folder}/") for path in self.objects if path.startswith(f"{folder}/"))

    def reads(self) -> list[tuple[str, int, int]]:
        """Path and range of every read."""
        return [(path, start, end) for what, path, *rest in self.asked if what == "read" for start, end in [rest]]


def _file_system(store: Store) -> type[fsspec.AbstractFileSystem]:
    remembered: dict[str, int] = {}
    listings: dict[str, list[dict[str, Any]]] = {}

    class FileSystem(fsspec.AbstractFileSystem):
        """Remembers sizes and listings until told to forget them, as the one client of a process does."""

        protocol = "gs"
        cachable = False

        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            self.remembered = remembered

        def invalidate_cache(self, path: str | None = None) -> None:
            self.remembered.clear()
            listings.clear()

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
            path = self._strip_protocol(path)
            begin, stop = start or 0, len(store.objects.get(path, b"")) if end is None else end
            store.asked.append(("read", path, begin, stop))
            if path not in store.objects:
                raise FileNotFoundError(path)
            return store.on_read(path, begin, stop, store.objects[path][begin:stop])

        def pipe_file(self, path: str, value: bytes, **options: object) -> None:
            path = self._strip_protocol(path)
            store.asked.append(("write", path))
            store.objects[path] = store.on_write(path, bytes(value))
            self.remembered[path] = len(value)

        def put_file(self, lpath: str, rpath: str, **options: object) -> None:
            self.pipe_file(rpath, Path(lpath).read_bytes())

        def info(self, path: str, **options: object) -> dict[str, Any]:
            path = self._strip_protocol(path)
            parent = path.rpartition("/")[0]
            if parent in listings:
                for entry in listings[parent]:
                    if entry["name"] == path:
                        return entry
                raise FileNotFoundError(path)
            store.asked.append(("size", path))
            if path in store.objects:
                return self._entry(path)
            if store.names(path):
                return {"name": path, "size": 0, "type": "directory"}
            raise FileNotFoundError(path)

        def ls(self, path: str, detail: bool = True, **options: object) -> list[Any]:
            """In an order that is nobody's: the last name first."""
            path = self._strip_protocol(path)
            if path in listings:
                return listings[path] if detail else [entry["name"] for entry in listings[path]]
            store.asked.append(("list", path))
            store.on_list(path)
            inside = store.names(path)
            if not inside:
                raise FileNotFoundError(path)
            heads = sorted({name.split("/")[0] for name in inside}, reverse=True)
            entries = [
                self._entry(f"{path}/{head}")
                if f"{path}/{head}" in store.objects
                else {"name": f"{path}/{head}", "size": 0, "type": "directory"}
                for head in heads
            ]
            listings[path] = entries
            return entries if detail else [entry["name"] for entry in entries]

        def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
            """Files at any depth, the last name first."""
            path = self._strip_protocol(path)
            store.asked.append(("list", path))
            store.on_list(path)
            found = [f"{path}/{name}" for name in reversed(store.names(path))]
            return {name: self._entry(name) for name in found} if options.get("detail") else found

        def rm_file(self, path: str) -> None:
            path = self._strip_protocol(path)
            store.asked.append(("remove", path))
            if path not in store.objects:
                raise FileNotFoundError(path)
            del store.objects[path]

        def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
            for name in store.names(self._strip_protocol(path)):
                self.rm_file(f"{self._strip_protocol(path)}/{name}")

        def _entry(self, path: str) -> dict[str, Any]:
            size = self.remembered.setdefault(path, len(store.objects[path]))
            return {"name": path, "size": size, "type": "file"}

    return FileSystem


@contextmanager
def own_store() -> Iterator[Store]:
    """A store that `gs://` leads to for as long as the context lasts."""
    store = Store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry, "gs", _file_system(store))
        yield store


class Clock:
    """A clock that stands still but where something waits or says that it takes long."""

    def __init__(self) -> None:
        self.began = self.now = 1000.0
        self.waits: list[float] = []

    def pass_by(self, seconds: float) -> None:
        """Lets time go by without a wait."""
        self.now += seconds


@contextmanager
def own_clock(share: float = 1.0) -> Iterator[Clock]:
    """Waiting with a limit costs nothing and moves `time.monotonic`; chance always takes `share` of its range."""
    clock, wait = Clock(), threading.Event.wait

    def waited(event: threading.Event, timeout: float | None = None) -> bool:
        if timeout is None:
            return wait(event)
        clock.waits.append(timeout)
        clock.now += timeout
        return event.is_set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Event, "wait", waited)
        patch.setattr(time, "sleep", lambda seconds: waited(threading.Event(), seconds))
        patch.setattr(time, "monotonic", lambda: clock.now)
        patch.setattr(random, "uniform", lambda low, high: low + share * (high - low))
        yield clock
