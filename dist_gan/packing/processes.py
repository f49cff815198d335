"""A pool of worker processes. Death, errors and interruption of a worker raise one exception in the calling process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection as pipes
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, Self, TypeVar

from dist_gan.types import TrainingFailed, UserError

Context = TypeVar("Context")
Job = TypeVar("Job")
Result = TypeVar("Result")
Tell = Callable[[int], object]
"""Function that reports progress: it is called with the number of further units of a job that are done."""
Work = Callable[[Context, Job, Tell], Result]


def num_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[Context]):
    """A pool of processes that work on jobs; a context manager that terminates them at its end.

    With `count` 1 the calling process does the work itself. Processes are spawned by the first call of `run` and are
    used again by later calls.

    Args:
        context: value that is passed to every job; it is pickled once for each process.
        count: number of processes.
    """

    def __init__(self, context: Context, *, count: int) -> None:
        assert count > 0
        self._context = context
        self._count = count
        self._processes: dict[pipes.Connection, SpawnProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()
        self._processes.clear()

    def run(self, work: Work[Context, Job, Result], jobs: Iterable[Job], *, tell: Tell) -> Iterator[Result]:
        """Results of `work(context, job, tell)` in the order of their completion.

        `work` is a function of a module, or a partial of one, since it is pickled. The iterable `jobs` is advanced only when
        a process is free.

        Raises:
            UserError: `work` raised it.
            TrainingFailed: `work` raised it, or a process died.
        """
        if self._count == 1:
            for job in jobs:
                yield work(self._context, job, tell)
            return
        waiting = iter(jobs)
        busy: set[pipes.Connection] = set()
        for place, job in zip(range(self._count), waiting, strict=False):
            pipe = self._process(place)
            _send(pipe, self._processes[pipe], (work, job))
            busy.add(pipe)
        while busy:
            ready = pipes.wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                kind, value = _receive(pipe, self._processes[pipe])
                if kind == "tell":
                    tell(value)
                    continue
                busy.discard(pipe)
                yield value
                for job in waiting:
                    _send(pipe, self._processes[pipe], (work, job))
                    busy.add(pipe)
                    break

    def _process(self, place: int) -> pipes.Connection:
        """The pipe to the process number `place`, which is spawned at the first call."""
        if place < len(self._processes):
            return list(self._processes)[place]
        # Spawned and not forked, because the calling process may have threads and locks, which a fork would copy.
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, self._context), name="dist-gan-data")
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours


def _send(pipe: pipes.Connection, process: SpawnProcess, job: object) -> None:
    try:
        pipe.send(job)
    except OSError as error:
        raise _death(process) from error


def _receive(pipe: pipes.Connection, process: SpawnProcess) -> tuple[str, Any]:
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError) as error:
        raise _death(process) from error
    if kind == "error":
        raise value
    return kind, value


def _leave_with(parent: int) -> None:
    """Waits for the parent process to die, and then exits at once, so that no worker still writes when the user starts the
    same command again."""
    pipes.wait([parent])
    os._exit(1)


def _death(process: SpawnProcess) -> TrainingFailed:
    process.join(timeout=5)
    return TrainingFailed(
        f"a process that worked on the data died (exit code {process.exitcode}; -9 is often a lack of memory); "
        f"start the same command again to go on, with fewer workers if it was memory"
    )


def _serve(pipe: pipes.Connection, context: Any) -> None:
    # Ctrl-C sends SIGINT to the whole process group; only the parent handles it, and terminates the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if pipes.wait([parent.sentinel], timeout=0):
        return  # the parent died during the start of this process; the pipe may hold a job nevertheless
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()
    try:
        while True:
            work, job = pipe.recv()
            try:
                result = work(context, job, lambda count: pipe.send(("tell", count)))
            except (UserError, TrainingFailed) as error:
                pipe.send(("error", error))
                return
            except BrokenPipeError:
                raise
            except Exception:
                pipe.send(("error", RuntimeError(f"in a data process:\n{traceback.format_exc()}")))
                return
            pipe.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent process has died or closed the pipe.
        return
