"""How well the order mixes, beside a full shuffle and beside a shuffle buffer, on data sorted by class.

    python benchmarks/shuffle.py [--json] [--picture docs/shuffle.png]

50,000 images in 50 shards, ten classes one after another. `classes`: distinct classes in a batch of 64. `chi_squared`:
of the class counts of a batch, over its degrees of freedom; 1 for independent draws, less if batches are more even than
those. `near`: how often two images of a batch are less than 64 places apart in the shards, over what a full shuffle has.
`again`: how often two images that shared a batch share one again in the next pass, over the same. The picture shows, from
left to right, a buffer of 1,000, our order and a full shuffle: across, the place in the pass; down, the place in the shards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_gan import pictures
from dist_gan.data.order import Order

IMAGES, SHARDS, CLASSES, BATCH, PASSES = 50_000, 50, 10, 64, 6
Sequence = NDArray[np.int64]


def full_shuffle(seed: int) -> Sequence:
    """Passes of independent permutations."""
    chance = np.random.default_rng(seed)
    return np.stack([chance.permutation(IMAGES) for _ in range(PASSES)])


def buffered(seed: int, *, size: int) -> Sequence:
    """Shards in a random order, through a buffer that gives one of its images at random."""
    chance = np.random.default_rng(seed)
    passes = []
    for _ in range(PASSES):
        line = np.concatenate(
            [np.arange(IMAGES // SHARDS) + shard * (IMAGES // SHARDS) for shard in chance.permutation(SHARDS)]
        )
        buffer, given = list(line[:size]), []
        for image in line[size:]:
            place = int(chance.integers(size))
            given.append(buffer[place])
            buffer[place] = image
        chance.shuffle(buffer)
        passes.append(np.array(given + buffer))
    return np.stack(passes)


def ours(seed: int, *, lanes: int, block: int) -> Sequence:
    """The order that training takes."""
    order = Order([IMAGES // SHARDS] * SHARDS, seed=seed, lanes=lanes, block=block)
    places = order.locate(np.arange(PASSES * IMAGES))
    return (places.shard * (IMAGES // SHARDS) + places.nth).reshape(PASSES, IMAGES)


def measured(passes: Sequence) -> dict[str, float]:
    """What the module says, before the division by the full shuffle's."""
    batches = passes[:, : IMAGES // BATCH * BATCH].reshape(PASSES, -1, BATCH)
    counts = np.stack([(batches * CLASSES // IMAGES == k).sum(axis=2) for k in range(CLASSES)], axis=2)
    expected = BATCH / CLASSES
    chi = ((counts - expected) ** 2 / expected).sum(axis=2) / (CLASSES - 1)
    ordered = np.sort(batches, axis=2)
    near = sum(((ordered[:, :, k:] - ordered[:, :, :-k]) < 64).sum() for k in range(1, 8)) / (BATCH * len(batches[0]))
    batch_of = np.empty((PASSES, IMAGES), dtype=np.int64)
    for number, one in enumerate(passes):
        batch_of[number, one] = np.arange(IMAGES) // BATCH
    again = 0
    for before, after in pairwise(range(PASSES)):
        mates = batch_of[after][batches[before]]
        mates.sort(axis=1)
        again += int((mates[:, 1:] == mates[:, :-1]).sum())
    return {
        "classes": float((counts > 0).sum(axis=2).mean()),
        "chi_squared": float(chi.mean()),
        "near": float(near),
        "again": float(again),
    }


def picture(sequences: list[Sequence], *, side: int = 256) -> NDArray[np.uint8]:
    """One panel for each, brightness by the number of images in each cell."""
    panels = []
    for passes in sequences:
        cells = np.zeros((side, side))
        np.add.at(cells, (passes[0] * side // IMAGES, np.arange(IMAGES) * side // IMAGES), 1)
        panels.append(np.minimum(cells * 60, 255).astype(np.uint8))
        panels.append(np.full((side, 8), 255, np.uint8))
    return np.concatenate(panels[:-1], axis=1)[:, :, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--picture", help="PNG file to write")
    options = parser.parse_args()
    sequences = {
        "full": full_shuffle(0),
        "buffer-1000": buffered(0, size=1000),
        "lanes-64-block-64": ours(0, lanes=64, block=64),
        "lanes-64-block-16": ours(0, lanes=64, block=16),
        "lanes-64-block-512": ours(0, lanes=64, block=512),
        "lanes-16-block-64": ours(0, lanes=16, block=64),
        "lanes-4-block-256": ours(0, lanes=4, block=256),
    }
    found = {name: measured(passes) for name, passes in sequences.items()}
    rows: list[dict[str, Any]] = []
    for name, values in found.items():
        for key in ("near", "again"):
            values[key] = values[key] / found["full"][key] if name != "full" else values[key]
        rows.append({"row": name} | {key: round(value, 3) for key, value in values.items()})
    for key in ("near", "again"):
        rows[0][key] = 1.0
    if not options.json:
        for row in rows:
            print(row)
    if options.picture:
        panels = [sequences[name] for name in ("buffer-1000", "lanes-64-block-64", "full")]
        pictures.write_png(options.picture, picture(panels))
    default = next(row for row in rows if row["row"] == "lanes-64-block-64")
    print(json.dumps({
        "benchmark": "shuffle",
        "machine": {"cores": os.cpu_count()},
        "rows": rows,
        "summary": {key: default[key] for key in ("classes", "chi_squared", "near", "again")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
