"""Lines for the person who watches: a reader that has left, or a full disk behind it, never ends the program."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dist_gan.wording import report


class _Unbreakable:
    """A text stream whose writes cannot fail; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Length of the text, which is lost if nobody takes it."""
        with self._tolerant():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what is buffered, if anybody takes it."""
        with self._tolerant():
            self._stream.flush()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            return  # closed
        except OSError as error:
            if error.errno == errno.EPIPE:  # for good; what is buffered has to go somewhere when the program ends
                with suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable() -> Iterator[None]:
    """Within it, nothing that prints to standard output or error can raise because of it, in whatever library."""
    before = sys.stdout, sys.stderr
    mine = tuple(s if s is None or isinstance(s, _Unbreakable) else _Unbreakable(s) for s in before)
    sys.stdout, sys.stderr = mine
    try:
        yield
    finally:
        for stream in mine:
            if stream is not None:
                stream.flush()
        if (sys.stdout, sys.stderr) == mine:
            sys.stdout, sys.stderr = before


def say(text: str) -> None:
    """The program's own message of a run that did not start or did not finish."""
    with unbreakable():
        print(report(f"dist_gan: {text}"), flush=True)
