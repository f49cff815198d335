"""Requests to stop training, which arrive as signals at any time and take effect at the end of a training step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2")
SECOND_SIGNAL_CODE = 130
"""Exit code of a process that a second stop signal has ended without saving."""
RELAYED_WITHIN_S = 5.0
"""Seconds after the first stop signal in which further signals count as the same request.

Slurm sends a signal to every process, and launchers send it to their processes a second time.
"""


class StoppedBeforeTraining(BaseException):
    """Raised for a stop request that arrived before training began; not an error, hence not an `Exception`."""


class StopRequest:
    """Stop requests to this process, by signal.

    Before training begins, the first signal raises `StoppedBeforeTraining`, since there is nothing to save. During
    training, the first signal only sets a flag; a second signal later ends the process at once without saving, which
    leaves the last committed checkpoint intact. Only the main thread handles signals. A HUP signal that was ignored
    before, as under nohup, stays ignored.

    Args:
        names: names of the signals that request a stop, without `SIG`.
        on_second: called with the name of the second signal before the process ends.
    """

    def __init__(self, names: tuple[str, ...] = SIGNALS, *, on_second: Callable[[str], object] | None = None) -> None:
        self.signal: str | None = None
        self._at = 0.0
        self._is_deferred = False
        self._on_second = on_second
        self._before: dict[int, Any] = {}
        for name in names:
            number = signal.Signals[f"SIG{name}"]
            if name == "HUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._receive)

    @property
    def requested(self) -> bool:
        """True if a stop has been requested."""
        return self.signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context that stop signals do not interrupt; at its end, `StoppedBeforeTraining` is raised if a signal arrived."""
        self._is_deferred, before = True, self._is_deferred
        try:
            yield
        finally:
            self._is_deferred = before
        if self.signal is not None and not before:
            raise StoppedBeforeTraining(self.signal)

    def training_begins(self) -> None:
        """Lets stop requests from now on only set a flag, which is read at the end of each training step.

        Raises:
            StoppedBeforeTraining: a stop request has arrived already.
        """
        self._is_deferred = True
        if self.signal is not None:
            raise StoppedBeforeTraining(self.signal)

    def request(self, name: str) -> None:
        """Requests a stop without a signal; `name` appears in `outcome.json` in place of a signal's name."""
        if self.signal is None:
            self.signal, self._at = name, time.monotonic()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.signal is None:
            self.signal, self._at = name, now
            if not self._is_deferred:
                raise StoppedBeforeTraining(name)
        elif now - self._at > RELAYED_WITHIN_S:
            try:
                if self._on_second is not None:
                    self._on_second(name)
            finally:
                os._exit(SECOND_SIGNAL_CODE)

    def close(self) -> None:
        """Restores the signal handlers that were in place before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
