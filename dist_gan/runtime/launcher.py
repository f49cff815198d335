"""Processes of this machine, read from /proc: the launcher of this rank, and the other ranks.

After a launcher was killed, its ranks get another parent process and continue to train without supervision; so each
rank watches its launcher. A process started from a shell by `python train.py` has no launcher, and may outlive the shell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_LAUNCHERS = ("accelerate", "torchrun", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
_AGENT = "TORCHELASTIC_RUN_ID"
"""Environment variable that only torch's launcher sets, for its workers."""
_SIMPLE = "ACCELERATE_MIXED_PRECISION"
"""Environment variable that accelerate sets for its workers.

A user may set the same variable, so a launcher is assumed only if an ancestor process runs accelerate, too.
"""


class Process(NamedTuple):
    """A process of this machine, identified by its ID and its start time, since the system uses IDs again."""

    pid: int
    began: int
    """Start time of the process, in clock ticks since the machine was booted."""

    @staticmethod
    def find(pid: int) -> Process | None:
        """Returns the process with the given ID; None if there is no such process, or no /proc."""
        fields = _stat(pid)
        return None if fields is None else Process(pid, int(fields[19]))

    def state(self) -> str:
        """Returns the state of the process as a letter: `T` stopped, `t` held by a debugger, `X` ended, others running."""
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.began or fields[0] in "ZX":
            return "X"
        return fields[0]

    def has_ended(self) -> bool:
        """Returns True if the process has ended, even if its parent has not yet asked for its exit code."""
        return self.state() == "X"

    def is_active_since(self, cpu: int) -> bool:
        """Returns True if the process has used more than `cpu` clock ticks of CPU time, or is held by a debugger."""
        return self.cpu() > cpu or self.state() == "t"

    def cpu(self) -> int:
        """Returns the CPU time used by the process, in clock ticks."""
        fields = _stat(self.pid)
        return 0 if fields is None else int(fields[11]) + int(fields[12])


def _stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat after the process name, the state first; None if they cannot be read.

    The process name may contain any character, spaces and parentheses too.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def has_proc() -> bool:
    """Returns True if this system has a readable /proc."""
    return _stat(os.getpid()) is not None


def find_launcher(environment: Mapping[str, str]) -> Process | None:
    """Returns the process of this rank's launcher; None if this rank has no launcher.

    The launcher need not be the parent process, since a script may stand between them. Under torch's launcher (torchrun,
    `accelerate launch` of several processes), the launcher is the nearest ancestor that was not itself started with this
    launch's environment variables. Under `accelerate launch` of one process, the launcher is the nearest ancestor that
    runs accelerate.

    Args:
        environment: environment variables of this process.
    """
    if _AGENT in environment:
        mine = f"{_AGENT}={environment[_AGENT]}"
        for process in _ancestors():
            try:
                given = Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")
            except OSError:
                return process  # belongs to another user, so it is no process of this launch
            if mine not in given:
                return process
    elif _SIMPLE in environment:
        return next((process for process in _ancestors() if _is_launcher(process.pid)), None)
    return None


def _ancestors() -> Iterator[Process]:
    """Yields the ancestors of this process: its parent, the parent's parent, and so on."""
    pid = os.getppid()
    while pid > 0 and (fields := _stat(pid)) is not None:
        yield Process(pid, int(fields[19]))
        pid = int(fields[1])


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return any(os.path.basename(word) in _LAUNCHERS for word in words[:6])


def siblings() -> list[int]:
    """Returns the IDs of the living children of this process's parent, this process included.

    Under torch's launcher these are the ranks on this machine.
    """
    parent, found = str(os.getppid()), []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and fields[1] == parent and fields[0] not in "ZX":
            found.append(int(folder.name))
    return found
