"""Processes of this machine as /proc shows them, and the one among them that launched this rank.

A launcher that is killed takes nothing with it: its ranks are handed to another parent and train on, unseen. So they look
after it. Whoever starts `python train.py` from a shell has no launcher, and outlives that shell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_LAUNCHERS = ("accelerate", "torchrun", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
_AGENT = "TORCHELASTIC_RUN_ID"
"""Set by torch's launcher for its workers, and by nobody else."""
_SIMPLE = "ACCELERATE_MIXED_PRECISION"
"""Set by accelerate for its workers. A user may have set it too, so it takes a launcher among the ancestors besides."""


class Process(NamedTuple):
    """A process of this machine, told apart from a later one with the same number."""

    pid: int
    began: int
    """Ticks since the machine was started."""

    @staticmethod
    def find(pid: int) -> Process | None:
        """The process with that number; None if there is none, or no /proc."""
        fields = _stat(pid)
        return None if fields is None else Process(pid, int(fields[19]))

    def state(self) -> str:
        """Letter of its state (`T` stopped, `t` held by a debugger); `X` once it has ended."""
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.began or fields[0] in "ZX":
            return "X"
        return fields[0]

    def cpu(self) -> int:
        """Ticks of CPU time that it has used."""
        fields = _stat(self.pid)
        return 0 if fields is None else int(fields[11]) + int(fields[12])


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on: the name before them may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def has_proc() -> bool:
    """Whether processes can be looked at here at all."""
    return _stat(os.getpid()) is not None


def find_launcher(environment: Mapping[str, str]) -> Process | None:
    """The launcher of this rank, which need not be its parent: a script may stand between.

    Under torch's launcher (torchrun, `accelerate launch` of several processes) it is the nearest ancestor that was not
    itself started with this launch's variables; under `accelerate launch` of one process, the nearest that is accelerate.

    Args:
        environment: of this process.
    """
    if _AGENT in environment:
        mine = f"{_AGENT}={environment[_AGENT]}"
        for process in _ancestors():
            try:
                given = Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")
            except OSError:
                return process  # somebody else's, so not one of ours in between
            if mine not in given:
                return process
    elif _SIMPLE in environment:
        return next((process for process in _ancestors() if _is_launcher(process.pid)), None)
    return None


def _ancestors() -> Iterator[Process]:
    """Parent, its parent, and so on."""
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
    """Living children of this process's parent, itself included: under torch's launcher, the ranks of this machine."""
    parent, found = str(os.getppid()), []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and fields[1] == parent and fields[0] not in "ZX":
            found.append(int(folder.name))
    return found
