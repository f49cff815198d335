"""Last actions of a process that ends: each has a time limit, and none can prevent the exit."""

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
"""Error numbers of disk failures that a restart does not cure."""
STEP_WITHIN_S = 5.0
"""Time limit, in seconds, of each last action: a store, disk or terminal that does not answer is abandoned."""
_STEP_BACK_S = 30.0
"""Seconds by which the error file is dated back: torch's launcher shows the earliest failure, and finding the missing
ranks takes time."""


def within(work: Callable[[], object], *, seconds: float = STEP_WITHIN_S) -> None:
    """Runs `work` in a thread of its own, ignoring exceptions; returns after `seconds` even if it has not ended."""

    def do() -> None:
        with suppress(Exception):  # the reported error is the earlier one
            work()

    thread = threading.Thread(target=do, name="ending", daemon=True)
    thread.start()
    thread.join(timeout=seconds)


def say_last(reason: str, *, launcher_waits: bool) -> None:
    """Reports why a run did not start or did not finish, as the last message on the terminal.

    torch's launcher ends with its own traceback, followed by the content of the ranks' error files; so the sentence
    goes into such a file. It is printed instead if no such launcher waits, or if that launcher is going to restart the
    ranks.

    Args:
        reason: one sentence.
        launcher_waits: True if the launcher of this process still runs.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    is_last = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) >= restarts
    text = "\n" + report(f"dist_gan: {reason}")
    # The launcher shows the earliest failure; of a killed rank it knows only the signal.
    if not (is_last and launcher_waits and write_error_file(text, time.time() - _STEP_BACK_S)):
        terminal.say(reason)


def write_error_file(text: str, failed_at: float) -> bool:
    """Writes a message into the error file of torch's launcher, in its format; returns False if there is no such file."""
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

    TensorBoard's writer raises the same error in the training thread at the next write, where it is reported.
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
    """Ends this process with an exit code, without taking the interpreter down; output is flushed first.

    At the end of a launch of several ranks, threads of torch still use connections. Destroying them can abort a process
    whose run has finished, and the launcher would report a failure.
    """
    for stream in (sys.stdout, sys.stderr):
        within(stream.flush)
    os._exit(code)
