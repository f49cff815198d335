"""A first sum that does not come back is said early, with what to look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import environment, free_port

WORKER = Path(__file__).with_name("first_reduction_worker.py")


def start(rank: int, port: int, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, str(WORKER), *arguments], env=environment(**place, **variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_sum_that_never_comes_back_is_said_with_what_to_check() -> None:
    port = free_port()
    ranks = [start(rank, port, "1") for rank in (0, 1)]
    try:
        said, errors = ranks[0].communicate(timeout=60)
        stopped, status = os.waitpid(ranks[1].pid, os.WUNTRACED | os.WNOHANG)
    finally:
        for rank in ranks:
            rank.kill()
        ranks[1].communicate(timeout=30)
    assert ranks[0].returncode == 3, errors[-2000:]
    assert stopped == ranks[1].pid
    assert os.WIFSTOPPED(status), "the fault has to have happened"
    assert "the 2 processes have met, but adding one number over the processes did not come back within 5 s" in said
    for hint in ("firewall", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "docs/launching.md"):
        assert hint in said
    assert "Traceback" not in said + errors


def test_an_interface_that_is_not_there_is_said_with_what_to_check() -> None:
    port = free_port()
    ranks = [start(rank, port, GLOO_SOCKET_IFNAME="nowhere0") for rank in (0, 1)]
    try:
        said, errors = ranks[0].communicate(timeout=60)
    finally:
        ranks[1].kill()  # it may come when rank 0 has left already, and with it the store
        ranks[1].communicate(timeout=30)
    assert ranks[0].returncode == 3, errors[-2000:]
    assert "the processes cannot be connected (Unable to find address for: nowhere0)" in said
    assert "GLOO_SOCKET_IFNAME" in said
