"""Whether the nodes of a job find each other, their run folder and a launcher, before anything is started on them.

Runs on every node at once, under srun. The first node listens where the launchers will; the others connect to it and
give their number. Ends with 0 on all nodes, or with 2 and one sentence on the node that knows best.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
from pathlib import Path

LOCK_SEEN_WITHIN_S = 10.0
"""Clients of a network file system may look at what they remember for a while."""
HEAD_LATER_S = 5.0
"""The first node gives up later, so that the one which could not reach it speaks first."""


def main() -> int:
    """Reads the command line and says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", required=True, help="address of the first node")
    parser.add_argument("--port", required=True, help="where the launchers will meet")
    parser.add_argument("--seconds", required=True, type=float, help="time for all nodes to meet")
    parser.add_argument(
        "--lock", type=Path, help="file of the run folder; left out if nodes need not share that folder"
    )
    parser.add_argument("--mark", default="", help="what the first node has written there")
    parser.add_argument("nodes", nargs="+", help="names, in the order of their numbers")
    given = parser.parse_args()
    number = int(os.environ["SLURM_NODEID"])
    problem = check_node(given.nodes[number], given.lock, given.mark)
    if problem is None and not (given.port.isdecimal() and 0 < int(given.port) < 65536):
        problem = f"DIST_GAN_PORT: '{given.port}' is no port"
    if problem is None:
        meet = listen if number == 0 else connect
        problem = meet(number, given.nodes, given.head, int(given.port), seconds=given.seconds)
    if problem is not None:
        print(f"dist_gan: {problem}", flush=True)
    return 0 if problem is None else 2


def check_node(node: str, lock: Path | None, mark: str) -> str | None:
    """What this node lacks."""
    if shutil.which("accelerate") is None:
        return (
            f"there is no accelerate on node {node}; name a virtual environment (DIST_GAN_VENV), modules or a container "
            f"that every node has"
        )
    if lock is None:
        return None
    deadline = time.monotonic() + LOCK_SEEN_WITHIN_S
    while True:
        try:
            if lock.read_text().split()[-1:] == [mark]:
                return None
        except OSError:
            pass
        if time.monotonic() > deadline:
            return (
                f"run.dir: node {node} does not see {lock.parent.parent}; choose a run.dir on a disk that all nodes share, or "
                f"keep the run in a store: checkpoint.url=s3://bucket/run"
            )
        time.sleep(0.5)


def listen(number: int, nodes: list[str], head: str, port: int, *, seconds: float) -> str | None:
    """Waits for every other node; who did not come."""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        why = os.strerror(error.errno or 0)
        return f"port {port} on node {nodes[0]} cannot be used ({why}); choose another one (DIST_GAN_PORT)"
    absent = set(range(1, len(nodes)))
    deadline = time.monotonic() + seconds + HEAD_LATER_S
    with server:
        while absent and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller, _ = server.accept()
                with caller:
                    caller.settimeout(1.0)
                    absent.discard(int(caller.recv(16) or b"0"))
            except (OSError, ValueError):
                continue  # late, or none of ours
    if absent:
        names = ", ".join(nodes[n] for n in sorted(absent))
        return f"node {names} did not join within {seconds:.0f} s; leave it out (sbatch --exclude={names.replace(' ', '')})"
    return None


def connect(number: int, nodes: list[str], head: str, port: int, *, seconds: float) -> str | None:
    """Gives this node's number to the first one; why it could not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(
                (head, port), timeout=max(0.1, min(10.0, deadline - time.monotonic()))
            ) as call:
                call.sendall(str(number).encode())
                return None
        except OSError as error:
            if time.monotonic() > deadline:
                return (
                    f"node {nodes[number]} could not reach the first node {nodes[0]} at {head}:{port} within {seconds:.0f} s "
                    f"({error.strerror or error}); open that port, or name another address of it (DIST_GAN_HEAD)"
                )
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
