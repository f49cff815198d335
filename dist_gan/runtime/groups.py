"""Process groups of a launch, and an early test that a reduction over all ranks succeeds."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_gan.runtime.meeting import Meeting
from dist_gan.runtime.rank_group import RankGroup
from dist_gan.types import TrainingFailed

_TO_CHECK = (
    "check that all machines reach each other on every port (firewall), and over the right network interface "
    "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO prints what was chosen): docs/launching.md, Several machines"
)
FIRST_REDUCTION_S = 120
"""Time limit, in seconds, of the first reduction; all ranks have joined the launch before this limit starts to run."""


def join(meeting: Meeting, *, on_cpu: bool, timeout: timedelta) -> None:
    """Creates the process group for training as accelerate would, over the launch's key-value store.

    Args:
        meeting: the launch's store, which all ranks have joined.
        on_cpu: True if the processes train on CPUs.
        timeout: time limit of a collective.

    Raises:
        TrainingFailed: the network interface for the connections is missing; the sentence names what to check.
    """
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo" if on_cpu else "cuda:nccl,cpu:gloo"
    # With this variable, processes connect through gloo on demand. By default every process connects to all others in
    # each of three groups: 190 connections of each of 64 ranks instead of 5 (docs/scaling.md).
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    try:
        dist.init_process_group(
            backend, store=meeting.store, rank=meeting.rank, world_size=meeting.world_size, timeout=timeout
        )
    except (dist.DistStoreError, dist.DistNetworkError):
        raise  # an error of the store: some process did not join
    except RuntimeError as error:
        raise TrainingFailed(f"the processes cannot be connected ({_in_short(error)}); {_TO_CHECK}") from error


def _in_short(error: RuntimeError) -> str:
    """Returns the first line of an error message from C++, without the source location."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^]]*\]\s*(\S+ [!=]= \S+\.\s*)?", "", lines[0])


def first_reduction(groups: Mapping[str, tuple[RankGroup, torch.device]], *, world_size: int, timeout_s: float) -> None:
    """Adds one number over all ranks in each process group, before training depends on a reduction. Collective.

    The ranks of a process group connect in its first reduction, which fails, or with NCCL hangs, if ports are closed or
    network interfaces are wrong. The reduction runs in a thread of its own, since a waiting NCCL call cannot be
    interrupted.

    Args:
        groups: group of ranks and device of its tensors, by a descriptive name.
        world_size: number of processes of the launch.
        timeout_s: time limit of all reductions together, in seconds.

    Raises:
        TrainingFailed: a reduction failed, timed out or gave a wrong sum; the sentence names what to check.
    """
    done: list[str] = []
    failed: list[str] = []

    def add() -> None:
        for name, (group, device) in groups.items():
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                total = float(group.sum(torch.ones(1, device=device)))
            except RuntimeError as error:
                failed.append(f"over {name} failed ({_in_short(error)})")
                return
            if total != world_size:
                failed.append(f"over {name} gave {total:g}")
                return
            done.append(name)

    thread = threading.Thread(target=add, name="first reduction", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if len(done) == len(groups):
        return
    waiting = next(name for name in groups if name not in done)
    what = failed[0] if failed else f"over {waiting} did not come back within {timeout_s:g} s"
    raise TrainingFailed(f"the {world_size} processes have met, but adding one number {what}; {_TO_CHECK}")
