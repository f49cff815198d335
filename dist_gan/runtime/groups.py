"""The processes of a launch find each other, and show early that a sum over all of them comes back."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_gan.runtime.meeting import Meeting
from dist_gan.types import TrainingFailed

_TO_CHECK = (
    "check that all machines reach each other on every port (firewall), and over the right network interface "
    "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO prints what was chosen): docs/launching.md, Several machines"
)
FIRST_REDUCTION_S = 120
"""Longest wait for the first sum: the processes have met by then, and only connections are left to be made."""


def join(meeting: Meeting, *, on_cpu: bool, timeout: timedelta) -> None:
    """Makes the training group, as accelerate would, but over the store in which the ranks have met.

    Raises:
        TrainingFailed: the network that the processes are to talk over is not there; says what to look at.
    """
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo" if on_cpu else "cuda:nccl,cpu:gloo"
    # gloo's processes then connect to those they talk to. By default each connects to all others in each of three groups,
    # and reads all their addresses from one store: of 64 ranks, 190 connections each instead of 5 (docs/scaling.md).
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    try:
        dist.init_process_group(
            backend, store=meeting.store, rank=meeting.rank, world_size=meeting.world_size, timeout=timeout
        )
    except (dist.DistStoreError, dist.DistNetworkError):
        raise  # of the store: some process did not come
    except RuntimeError as error:
        raise TrainingFailed(f"the processes cannot be connected ({_in_short(error)}); {_TO_CHECK}") from error


def _in_short(error: RuntimeError) -> str:
    """The first line of what a library in C++ says, without the place in its source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^]]*\]\s*(\S+ [!=]= \S+\.\s*)?", "", lines[0])


def first_reduction(
    places: Mapping[str, tuple[dist.ProcessGroup | None, torch.device]], *, world_size: int, timeout_s: float
) -> None:
    """Adds one number over all ranks in each group, before anything else depends on a sum. Collective.

    Connections are made in the first sum of a group, and it is there that closed ports and wrong interfaces show: with
    NCCL as silence. The sum runs in a thread of its own, since a call that waits in NCCL returns to nobody.

    Args:
        places: by what a person would call it, a group and the device that its numbers lie on.
        world_size: processes of the launch.
        timeout_s: longest wait for all sums.

    Raises:
        TrainingFailed: a sum failed, is wrong, or did not come back; says what to look at.
    """
    done: list[str] = []
    failed: list[str] = []

    def add() -> None:
        for name, (group, device) in places.items():
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                number = torch.ones(1, device=device)
                dist.all_reduce(number, group=group)
                total = float(number)
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
    if len(done) == len(places):
        return
    waiting = next(name for name in places if name not in done)
    what = failed[0] if failed else f"over {waiting} did not come back within {timeout_s:g} s"
    raise TrainingFailed(f"the {world_size} processes have met, but adding one number {what}; {_TO_CHECK}")
