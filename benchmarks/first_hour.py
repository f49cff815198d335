"""Trains the README's recipe for own images, by the README's commands, and prints whether and how fast it learns.

    python benchmarks/first_hour.py --data FOLDER_OR_ZIP [--json] [--images 30k] [--pictures 2600] [--seeds 1]
        [--resolution 64] [--out runs/first-hour] [key=value ...]

The pictures are `dist-gan pack`ed with --upscale, and `configs/photos-64.yaml` (or -128) is trained on two processes of
the CPU. `rows` follow the game: losses, and the distance of the logits of real and generated images. `summary` holds, of
all seeds the worst: `gap_least` and `gap_most`, the distance's extremes over the second half of the run, finite and
above 0 where the game goes on; `discriminator_loss_least` in the same half; seconds of the clock and of the CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_gan.config.values import parse_number

ROOT = Path(__file__).resolve().parents[1]
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def cut(source: Path, folder: Path, *, pictures: int) -> int:
    """Copies `pictures` images of a folder or zip, evenly spaced over its sorted names, with their folders; how many."""
    archive = zipfile.ZipFile(source) if source.suffix == ".zip" else None
    if archive is not None:
        names = sorted(name for name in archive.namelist() if name.lower().endswith(ENDINGS))
    else:
        names = sorted(
            p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()
        )
    count = min(pictures, len(names)) or len(names)
    for index in range(count):
        name = names[index * len(names) // count]
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(archive.read(name) if archive is not None else (source / name).read_bytes())
    return count


def one_run(seed: int, shards: Path, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains with one seed; the game over the images seen."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml", "--main_process_port", "0",
        "train.py", f"configs/photos-{options.resolution}.yaml", f"data.url={shards}", f"run.dir={run}",
        f"run.images={options.images}", f"run.seed={seed}", *options.overrides,
    ]  # fmt: skip
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"seed {seed}: the run ended with {done.returncode}:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [game(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    late = [row for row in rows if row["images"] > rows[-1]["images"] / 2]
    return {
        "seed": seed,
        "gap_least": min(row["gap"] for row in late),
        "gap_most": max(row["gap"] for row in late),
        "discriminator_loss_least": min(row["discriminator_loss"] for row in late),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "grid": str(max((run / "samples").glob("*.png"), key=lambda path: path.stem[-12:])),
        "rows": rows,
    }


def game(line: dict[str, Any]) -> dict[str, float]:
    """What one line of metrics.jsonl says of the game."""
    return {
        "images": line["images"],
        "gap": round(line["logits/real"] - line["logits/fake"], 4),
        "discriminator_loss": round(line["loss/discriminator"], 4),
        "generator_loss": round(line["loss/generator"], 4),
        "images_per_second": round(line["time/images_per_second"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or zip of pictures")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--images", default="30k", help="images that each run sees")
    parser.add_argument("--pictures", type=int, default=2600, help="pictures of the data set; 0 for all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--resolution", type=int, choices=(64, 128), default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "first-hour", help="the runs go to OUT-seed-N")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    options.images = parse_number(options.images)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        count = cut(options.data, Path(folder, "photos"), pictures=options.pictures)
        shards = Path(folder, "shards")
        pack = [sys.executable, "-m", "dist_gan.cli", "pack", f"{folder}/photos", str(shards), "--upscale"]
        pack += ["--resolution", str(options.resolution), "--channels", "3"]
        subprocess.run(pack, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        for seed in range(options.seeds):
            run = options.out.with_name(f"{options.out.name}-seed-{seed}").absolute()
            if run.exists():
                sys.exit(f"{run} is there already: remove it, or give another --out")
            results.append(one_run(seed, shards, run, options))
            if not options.json:
                print(json.dumps(results[-1], indent=1), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    summary = {"pictures": count} | {
        name: worst(result[name] for result in results)
        for name, worst in (
            ("gap_least", min), ("gap_most", max), ("discriminator_loss_least", min), ("seconds", max),
            ("cpu_seconds", max),
        )
    }  # fmt: skip
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(
        json.dumps(
            {"benchmark": "first_hour", "commit": commit.stdout.strip(), "machine": machine, "rows": results,
             "summary": summary}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
