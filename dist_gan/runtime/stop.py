"""A request to stop, by signal: noticed at once, obeyed at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = ("TERM", "INT", "USR1", "USR2")
LEFT_AT_ONCE = 130
"""Exit code after a second signal."""
RELAYED_WITHIN_S = 5.0
"""A signal so soon after the first is the same request: Slurm tells every process, and launchers pass it on again."""


class StopRequest:
    """Whether somebody has asked this process to stop.

    The first signal sets a flag and nothing else; a second one, later, leaves at once, without saving: the last
    committed checkpoint is whole whatever was being written. Loader threads never see signals.

    Args:
        names: signals that are a request, without `SIG`.
    """

    def __init__(self, names: tuple[str, ...] = SIGNALS) -> None:
        self.signal: str | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}
        for name in names:
            number = signal.Signals[f"SIG{name}"]
            self._before[number] = signal.signal(number, self._notice)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = signal.Signals(number).name, now
        elif now - self._at > RELAYED_WITHIN_S:
            os._exit(LEFT_AT_ONCE)

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
