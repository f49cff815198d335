"""A request to stop, by signal: noticed at once, obeyed at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2")
LEFT_AT_ONCE = 130
"""Exit code after a second signal."""
RELAYED_WITHIN_S = 5.0
"""A signal so soon after the first is the same request: Slurm tells every process, and launchers pass it on again."""


class Stopped(BaseException):
    """A process was asked to stop before it trained; no error, and not to be caught as one."""


class StopRequest:
    """Whether somebody has asked this process to stop.

    Until training begins, the first signal raises `Stopped`: there is nothing to save. After that it sets a flag and
    nothing else; a second one, later, leaves at once, without saving: the last committed checkpoint is whole whatever was
    being written. Loader threads never see signals. A hangup that is ignored, as under nohup, stays ignored.

    Args:
        names: signals that are a request, without `SIG`.
        on_second: is told the name of the second signal before the process ends for it.
    """

    def __init__(self, names: tuple[str, ...] = SIGNALS, *, on_second: Callable[[str], object] | None = None) -> None:
        self.signal: str | None = None
        self._at = 0.0
        self._deferred = False
        self._on_second = on_second
        self._before: dict[int, Any] = {}
        for name in names:
            number = signal.Signals[f"SIG{name}"]
            if name == "HUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._notice)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Within it no signal interrupts: what is half done would be left without a word. It is obeyed at the end."""
        self._deferred, before = True, self._deferred
        try:
            yield
        finally:
            self._deferred = before
        if self.signal is not None and not before:
            raise Stopped(self.signal)

    def training_begins(self) -> None:
        """From here on a request is obeyed at the end of a step."""
        self._deferred = True
        if self.signal is not None:
            raise Stopped(self.signal)

    def ask(self, name: str) -> None:
        """The same request without a signal; `name` is what the outcome calls it."""
        if self.signal is None:
            self.signal, self._at = name, time.monotonic()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.signal is None:
            self.signal, self._at = name, now
            if not self._deferred:
                raise Stopped(name)
        elif now - self._at > RELAYED_WITHIN_S:
            try:
                if self._on_second is not None:
                    self._on_second(name)
            finally:
                os._exit(LEFT_AT_ONCE)

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
