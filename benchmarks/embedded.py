"""Whether the embedded run covers its modes: the command of the README, once for each seed.

python benchmarks/embedded.py [--json] [--seeds 3] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def one_run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """`accelerate launch train.py` with a seed; the facts of its last event."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "train.py",
            f"run.dir={folder}/run",
            f"run.seed={seed}",
        ]
        subprocess.run([*command, *overrides], check=True, capture_output=True, cwd=ROOT)
        end = json.loads(Path(folder, "run", "events.jsonl").read_text().splitlines()[-1])
    modes = {name.removeprefix("metric/"): value for name, value in end["metrics"].items()}
    return {"seed": seed, "images": end["images"], "seconds": end["seconds"]} | modes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        rows.append(one_run(seed, options.overrides))
        if not options.json:
            print(rows[-1], flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    summary = {
        "modes_covered": min(row["modes_covered"] for row in rows),
        "smallest_share": min(row["smallest_share"] for row in rows),
        "valid_fraction": min(row["valid_fraction"] for row in rows),
        "seconds": max(row["seconds"] for row in rows),
    }
    machine = {"cores": os.cpu_count()}
    print(
        json.dumps(
            {
                "benchmark": "embedded",
                "commit": commit.stdout.strip(),
                "machine": machine,
                "rows": rows,
                "summary": summary,
            }
        )
    )


if __name__ == "__main__":
    main()
