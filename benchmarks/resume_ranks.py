"""Whether a run that goes on in new processes ends with the bits of one that was never interrupted.

    python benchmarks/resume_ranks.py [--json] [--strategy NAME ...] [--processes N ...] [--only CASE ...]

For every strategy on 1, 2, 3 and 4 CPU processes two launches: the first trains each case without a break and leaves
checkpoints on its way, the second makes everything anew from each checkpoint and trains as far. Compared are all tensors
that a checkpoint keeps, the losses of every step, and the keys of the next batch; every rank has data of its own. The
rows give the largest number of tensors that differ, over the stops of a case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parity import launch_file, make_shards

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("single", "ddp", "zero0", "zero1", "zero2", "zero3")
PROCESSES = (1, 2, 3, 4)


def launch(
    strategies: Sequence[str], processes: int, *, shards: Path, out: Path, which: str, only: Sequence[str]
) -> list[dict[str, Any]]:
    """Trains the cases in new processes; what each rank reports.

    Raises:
        RuntimeError: with the end of what the launch said.
    """
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    extra = [word for name in only for word in ("--only", name)]
    if strategies[0] == "single":
        command = [sys.executable]
    else:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        # The stages share a launch; the third partitions every tensor, however small.
        file = launch_file("ddp" if strategies[0] == "ddp" else "zero3", out)
        command += ["--config_file", str(file), "--num_processes", str(processes), "--main_process_port", str(port)]
        if strategies[0] != "ddp":
            extra += [word for name in strategies for word in ("--strategy", name)]
    command += [str(ROOT / "benchmarks" / "resume_ranks_worker.py"), str(shards), str(out), which, *extra]
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("ACCELERATE_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": "/nonexistent",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-9000:]}")
    return [json.loads((out / f"{which}-{rank}.json").read_text()) for rank in range(processes)]


def compare(
    strategies: Sequence[str], processes: int, *, shards: Path, out: Path, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Two launches, one after the other; a row for each strategy and case."""
    wanted = {"shards": shards, "out": out, "only": only}
    whole = launch(strategies, processes, which="unbroken", **wanted)
    again = launch(strategies, processes, which="resumed", **wanted)
    shutil.rmtree(out)
    rows = []
    for place, entry in whole[0].items():
        strategy, case = place.split("/", 1)
        different: dict[str, int] = {}
        logs = keys = 0
        for stop in entry["stops"]:
            names = set()
            for mine, theirs in zip(whole, again, strict=True):
                a, b = mine[place]["stops"][stop], theirs[place]["stops"][stop]
                names |= {
                    n for n in a["tensors"].keys() | b["tensors"].keys() if a["tensors"].get(n) != b["tensors"].get(n)
                }
                logs += a["log"] != b["log"]
                keys += a["keys"] != b["keys"]
            different[stop] = len(names)
        rows.append({
            "strategy": strategy, "processes": processes, "case": case,
            "tensors": len(next(iter(entry["stops"].values()))["tensors"]),
            "different_tensors": max(different.values()), "different_after_stop": different,
            "different_logs": logs, "different_keys": keys,
            "seconds": round(entry["seconds"] + again[0][place]["seconds"], 2),
        })  # fmt: skip
    return rows


def groups_of(strategies: Sequence[str], processes: int) -> list[list[str]]:
    """Strategies that share a launch; a lone process has no DDP, several are not `single`."""
    found = [["single"]] if processes == 1 and "single" in strategies else []
    if processes > 1 and "ddp" in strategies:
        found.append(["ddp"])
    zero = [name for name in strategies if name.startswith("zero")]
    return [*found, zero] if zero else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES)
    parser.add_argument("--processes", action="append", type=int, choices=PROCESSES)
    parser.add_argument("--only", action="append", default=[], help="a case's name")
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        shards = make_shards(Path(name) / "shards")
        make_shards(Path(name) / "shards-32", resolution=32)
        for processes in options.processes or PROCESSES:
            for together in groups_of(options.strategy or STRATEGIES, processes):
                out = Path(name) / f"{together[0]}-{processes}"
                rows += compare(together, processes, shards=shards, out=out, only=options.only)
                if not options.json:
                    for row in (r for r in rows if r["processes"] == processes and r["strategy"] in together):
                        print(json.dumps(row), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    different = sum(row["different_tensors"] for row in rows)
    others = sum(row["different_logs"] + row["different_keys"] for row in rows)
    print(json.dumps({
        "benchmark": "resume_ranks",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        "rows": rows,
        "summary": {
            "rows": len(rows), "different_tensors": different, "different_logs_and_keys": others,
            "seconds": round(time.monotonic() - began, 1),
        },
    }))  # fmt: skip
    sys.exit(bool(different or others))


if __name__ == "__main__":
    main()
