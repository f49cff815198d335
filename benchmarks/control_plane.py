"""What the control plane costs as ranks are added: many ranks on one machine, each a process, none with a GPU.

    python benchmarks/control_plane.py [--json] [--ranks 16 64 256] [--megabytes 8]

Every rank is a fork of one process that has imported everything, and makes the Runtime that a training run makes: the
rendezvous, the process groups, the heartbeat. Then all ranks compare settings, vote on a flag, read a manifest, find
their images, commit a checkpoint, and lose a rank to SIGKILL. What the launch's store was sent and sent itself is read from the
kernel's counters of its connections (`ss`), connection by connection.

All ranks share the cores of this machine, so seconds say how work grows, not how long a cluster waits; bytes, requests,
connections and files are those of a cluster. docs/scaling.md has the table and the projection.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.distributed import TCPStore

from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection, RuntimeSection
from dist_gan.data.manifest import read_manifest
from dist_gan.data.order import Order
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack
from dist_gan.runtime import LaunchSettings, LostRanks, Runtime
from dist_gan.types import TensorFacts

SAMPLES = 2_000
BIG_SET = (1_281_167, 1_000)
"""Images of ImageNet, and images a shard."""
VOTES = 20
TENSORS = 64


class Weights:
    """A part of a checkpoint: tensors that are the same on every rank."""

    def __init__(self, megabytes: int) -> None:
        self._tensors = {f"{n:03d}": torch.full((megabytes * 2**20 // 4 // TENSORS,), float(n)) for n in range(TENSORS)}

    def table(self) -> dict[str, TensorFacts]:
        return {name: TensorFacts(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def values(self) -> dict[str, Any]:
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        assert not values


def main() -> None:
    """Runs every size and prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--megabytes", type=int, default=8, help="of the checkpoint, over all ranks")
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    torch.set_num_threads(1)
    # torch looks up the name of every address that connects: a resolver that drops some of so many questions from one machine
    # would be waited for here for ten seconds, which no cluster of machines does to itself.
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the ranks are ended on the way out
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 16, 16, 3), dtype=np.uint8)
        shards = Path(folder, "shards")
        # Apart, because a process with threads cannot be forked safely.
        if (child := os.fork()) == 0:
            pack(ArraySource(pixels), str(shards), samples_per_shard=500, workers=1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        results = []
        for ranks in given.ranks:
            results.append(measure(ranks, Path(folder, str(ranks)), shards, megabytes=given.megabytes))
            if given.json:
                print(json.dumps(results[-1]), flush=True)
    if not given.json:
        width = max(map(len, results[0]))
        for name in results[0]:
            print(f"{name:{width}}" + "".join(f"{result[name]:>12,.6g}" for result in results))


def measure(ranks: int, folder: Path, shards: Path, *, megabytes: int) -> dict[str, float]:
    """One size: forks the ranks, keeps their store, and gathers what they measured."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    before = _memory_in_use()
    pids = []
    began = time.monotonic()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be_a_rank(rank, ranks, port, folder, shards, began, megabytes)
        pids.append(pid)
    # After the forks: its threads would not live on in them.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600))
    result: dict[str, float] = {"ranks": ranks}
    try:
        _wait_for(folder / "joined")
        joined = _store_traffic(port)
        result |= {
            "store_connections": joined["connections"],
            "store_requests_a_rank": joined["requests"] / ranks,
            "store_sent_a_rank_kib": joined["sent"] / ranks / 1024,
            "store_sent_mib": joined["sent"] / 2**20,
            "sockets_a_rank": _sockets_in_use() / ranks,
            "memory_a_rank_mib": (_memory_in_use() - before) / ranks / 2**20,
        }
        time.sleep(5.0)
        idle = _store_traffic(port)
        result["store_requests_idle_a_second"] = (idle["requests"] - joined["requests"]) / 5.0
        (folder / "counted").touch()
        _wait_for(folder / "quiet")
        quiet = _requests(port)
        os.kill(pids[-1], signal.SIGKILL)
        most: dict[str, int] = {}  # of each connection: those that have ended are no longer listed
        while not all((folder / f"lost-{rank}.json").exists() for rank in range(ranks - 1)):
            most |= _requests(port)
            time.sleep(0.05)
        result["loss_store_requests_a_rank"] = sum(most[peer] - quiet.get(peer, 0) for peer in most) / ranks
        losses = [json.loads((folder / f"lost-{rank}.json").read_text()) for rank in range(ranks - 1)]
        assert all(loss["reason"] and f"rank {ranks - 1} died" in loss["reason"] for loss in losses), losses[0]
        result["loss_named_s"] = max(loss["seconds"] for loss in losses)
        result |= json.loads((folder / "rank-0.json").read_text())
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        del store
    return result


def _be_a_rank(rank: int, ranks: int, port: int, folder: Path, shards: Path, began: float, megabytes: int) -> None:
    """The whole life of a forked rank; never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        section = RuntimeSection(device="cpu", threads=1)
        killed, lock = [time.monotonic()], threading.Lock()

        def record(lost: LostRanks) -> None:
            """Whoever finds out first: the thread in the collective, or the one that looks after the neighbours."""
            place = folder / f"lost-{rank}.json"
            with lock:
                if lost.reason and not place.exists():
                    seconds = time.monotonic() - killed[0]
                    place.with_suffix(".part").write_text(json.dumps({"reason": lost.reason, "seconds": seconds}))
                    place.with_suffix(".part").rename(place)

        runtime = Runtime(section, LaunchSettings("ddp"), on_lost=record)
        runtime.control_group.barrier()
        joined_s = time.monotonic() - began
        if runtime.is_main:
            (folder / "joined").touch()
            _wait_for(folder / "counted")
        runtime.control_group.barrier()
        found: dict[str, float] = {"join_s": joined_s}
        found["compare_settings_s"] = _timed(
            runtime, lambda: runtime.control_group.gather_json({"the settings": "0" * 300})
        )
        found["vote_ms"] = 1e3 * statistics.median(
            _timed(runtime, lambda: runtime.control_group.any_rank(False), apart=False) for _ in range(VOTES)
        )
        found["manifest_s"] = _timed(runtime, lambda: read_manifest(str(shards)))
        found["manifest_bytes_an_image"] = os.path.getsize(shards / "manifest.json") / SAMPLES
        found |= _order(runtime)
        found |= _commit(runtime, folder / "checkpoints", megabytes)
        runtime.control_group.barrier()
        if runtime.is_main:
            (folder / "rank-0.json").write_text(json.dumps(found))
            (folder / "quiet").touch()
        try:
            while True:
                runtime.control_group.barrier()
                killed[0] = time.monotonic()
        except RuntimeError:
            record(runtime.find_lost_ranks())
        # Leaves, so that those who were waiting for this rank find out too.
    except BaseException:
        traceback.print_exc()
        faulthandler.dump_traceback()
    finally:
        os._exit(1)


def _timed(runtime: Runtime, work: Any, *, apart: bool = True) -> float:
    """Seconds until the slowest rank has done it."""
    if apart:
        runtime.control_group.barrier()
    began = time.perf_counter()
    work()
    if apart:
        runtime.control_group.barrier()
    return time.perf_counter() - began


def _order(runtime: Runtime) -> dict[str, float]:
    """The order of a large data set, on this rank alone in its turn."""
    images, a_shard = BIG_SET
    began = time.process_time()
    order = Order([a_shard] * (images // a_shard), seed=0, lanes=1024, block=64)
    positions = np.arange(runtime.rank, 64 * runtime.world_size, runtime.world_size, dtype=np.int64)
    order.locate(positions)
    first = time.process_time() - began
    began = time.process_time()
    for draw in range(1, 6):
        order.locate(positions + draw * 64 * runtime.world_size)
    found = {"order_first_s": first, "order_next_ms": 1e3 * (time.process_time() - began) / 5}
    runtime.control_group.barrier()
    return found


def _commit(runtime: Runtime, folder: Path, megabytes: int) -> dict[str, float]:
    checkpointer = Checkpointer(str(folder), runtime=runtime, section=CheckpointSection(), facts={})
    runtime.control_group.barrier()
    url = checkpointer.save(0, {"weights": Weights(megabytes)})
    checkpointer.drain()
    if not runtime.is_main:
        return {}
    (written,) = checkpointer.finished()
    files = list(Path(url).iterdir())
    return {
        "commit_s": written.durable_s,
        "commit_files": len(files),
        "commit_manifest_kib": os.path.getsize(Path(url) / "manifest.json") / 1024,
    }


def _connections(port: int) -> list[str]:
    """What the kernel knows of each connection at the store's end."""
    command = ["ss", "-tinHO", "state", "established", f"( sport = :{port} )"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _counter(line: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", line)
    return int(match[1]) if match else 0


def _requests(port: int) -> dict[str, int]:
    """Requests so far by connection: segments with data in them."""
    return {line.split()[3]: _counter(line, "data_segs_in") for line in _connections(port)}


def _store_traffic(port: int) -> dict[str, float]:
    """Of all connections to the store so far."""
    listed = _connections(port)
    return {
        "connections": len(listed),
        "sent": sum(_counter(line, "bytes_sent") for line in listed),
        "requests": sum(_counter(line, "data_segs_in") for line in listed),
    }


def _sockets_in_use() -> int:
    """TCP sockets of this machine."""
    text = Path("/proc/net/sockstat").read_text()
    match = re.search(r"TCP: inuse (\d+)", text)
    assert match is not None
    return int(match[1])


def _memory_in_use() -> int:
    """Bytes that are not available on this machine."""
    facts = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    return (int(facts["MemTotal"]) - int(facts["MemAvailable"])) * 1024


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 900
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.05)


if __name__ == "__main__":
    main()
