"""What a process can still do on its way out: each thing within a limit of time, and none of them able to stop it."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_gan import terminal
from dist_gan.wording import report

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What starting again does not mend."""
STEP_WITHIN_S = 5.0
"""For each thing to be done on the way out: a store, disk or terminal that does not answer is left to itself."""
_STEP_BACK_S = 30.0
"""A sentence that is to be shown last is dated back by the time it takes to find out who is missing."""


def within(work: Callable[[], object], *, seconds: float = STEP_WITHIN_S) -> None:
    """Does something in a thread of its own, and goes on without it if it does not end."""

    def do() -> None:
        with suppress(Exception):  # on the way out, each thing is tried; what has failed before is what is told
            work()

    thread = threading.Thread(target=do, name="ending", daemon=True)
    thread.start()
    thread.join(timeout=seconds)


def say_last(reason: str, *, launcher_waits: bool) -> None:
    """Says why a run did not start or did not finish, so that it stands last on the terminal.

    torch's launcher ends with a traceback of its own and, under it, what the ranks have left for it; so the sentence is left
    there. Where no such launcher waits, or it is going to start the ranks again, it is printed.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    is_last = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) >= restarts
    text = "\n" + report(f"dist_gan: {reason}")
    # It shows the earliest failure last, and of a rank that was killed it knows only the signal.
    if not (is_last and launcher_waits and write_error_file(text, time.time() - _STEP_BACK_S)):
        terminal.say(reason)


def write_error_file(text: str, failed_at: float) -> bool:
    """Leaves a message where torch's launcher looks for one, in its format; whether it took it."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return False
    with suppress(OSError):
        Path(place).write_text(json.dumps({"message": text, "timestamp": int(failed_at)}))
        return True
    return False


@contextmanager
def silent_about_full_disks() -> Iterator[None]:
    """Within it, a thread that cannot write ends without a traceback.

    TensorBoard's raises the same error in the training thread at the next line it is given, where it is told once.
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
