"""Output to the terminal that cannot fail: neither a closed pipe nor a full disk ever ends the program."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dist_gan.wording import report


class _Unbreakable:
    """Wrapper of a text stream whose writes and flushes never raise; other attributes are those of the stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text, or drops it if the stream fails; returns the length of the text."""
        with self._tolerant():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream; errors of the stream are ignored."""
        with self._tolerant():
            self._stream.flush()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            return  # the stream is closed
        except OSError as error:
            if error.errno == errno.EPIPE:  # permanent; the buffer has to be written somewhere at exit
                with suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self._stream.fileno())
                    os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable() -> Iterator[None]:
    """Context in which no library's writes to standard output or standard error raise an exception."""
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
    """Prints a message of the program, such as the reason why a run did not start or did not finish."""
    with unbreakable():
        print(report(f"dist_gan: {text}"), flush=True)
