"""Last actions of a process before its exit; each action has a time limit, and no action can prevent the exit."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_gan.process import terminal
from dist_gan.wording import report

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers (`errno`) of disk failures that remain after a restart."""
STEP_WITHIN_S = 5.0
"""Time limit, in seconds, of each last action, such as a write to a store, disk or terminal that does not answer."""
_STEP_BACK_S = 30.0
"""Seconds by which the time in a rank's error file is set back.

torch's launcher shows the failure with the earliest time, and the rank that reports needs time to find the lost ranks.
"""


def within(work: Callable[[], object], *, seconds: float = STEP_WITHIN_S) -> None:
    """Runs `work` in a thread, ignoring exceptions; returns after `seconds` at the latest, even if `work` still runs."""

    def do() -> None:
        with suppress(Exception):  # the reported error is the earlier one
            work()

    thread = threading.Thread(target=do, name="ending", daemon=True)
    thread.start()
    thread.join(timeout=seconds)


def say_last(reason: str, *, launcher_waits: bool) -> None:
    """Reports why a run did not start or did not finish, as the last message on the terminal.

    torch's launcher ends with its own traceback, followed by the content of the ranks' error files; the sentence is
    therefore written into such a file. The sentence is printed instead if there is no such launcher, or if the launcher
    will restart the ranks.

    Args:
        reason: one sentence.
        launcher_waits: True if the launcher of this process still runs.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    is_last = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) >= restarts
    text = "\n" + report(f"dist_gan: {reason}")
    # The launcher shows only the earliest failure; about a killed rank, it would show only the signal.
    if not (is_last and launcher_waits and write_error_file(text, time.time() - _STEP_BACK_S)):
        terminal.say(reason)


def write_error_file(text: str, failed_at: float) -> bool:
    """Writes a message into this rank's error file for torch's launcher; returns False if there is no such file.

    Args:
        text: the message.
        failed_at: time of the failure, in seconds since the epoch.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return False
    with suppress(OSError):
        Path(place).write_text(json.dumps({"message": text, "timestamp": int(failed_at)}))
        return True
    return False


@contextmanager
def silent_about_full_disks() -> Iterator[None]:
    """Context in which a thread that fails on a full or read-only disk ends without a traceback.

    TensorBoard's writer raises the same error in the training thread at its next write, and there the error is reported.
    """
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        error = failure.exc_value
        if not (isinstance(error, OSError) and error.errno in DISK_TROUBLE):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def leave(code: int) -> None:
    """Flushes the output, and ends this process with an exit code, without the shutdown of the Python interpreter.

    At the end of a launch of several ranks, threads of torch still use connections. A shutdown destroys the connections,
    which can abort a process whose run has finished, and the launcher would then report a failure.
    """
    for stream in (sys.stdout, sys.stderr):
        within(stream.flush)
    os._exit(code)
