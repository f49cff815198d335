"""One run on 4, 2, 1 and 4 processes, killed in between: together they draw the sequence of one process."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import ROOT, launch

SCRIPT = ROOT / "tests" / "dist" / "instrumented.py"
BATCH, IMAGES = 32, 2560
LEGS = ((4, "kill:31", IMAGES), (2, "kill:75", IMAGES), (1, "record", 1760), (4, "record", IMAGES))
"""Processes, what becomes of them (rank 1 is killed when it takes that draw), and the images they are to reach."""


def drawn(shards: Path, run: Path, out: Path, *, processes: int, fault: str, images: int) -> dict[int, list[str]]:
    """The keys of each draw that all ranks took part in, by slot."""
    settings = [
        f"data.url={shards}", f"run.dir={run}", f"run.images={images}", f"run.batch={BATCH}", "data.lanes=16",
        "data.block=8", "data.prefetch=2", "networks.resolution=16", "networks.g_width=4", "networks.d_width=4",
        "networks.latent_dim=8", "log.samples=4", "runtime.threads=1", "checkpoint.every=160", "data.cache=0",
    ]  # fmt: skip
    done = launch(
        SCRIPT, [str(out), fault, "configs/dcgan-cifar10.yaml", *settings], processes=processes, timeout_s=200
    )
    killed = fault.startswith("kill")
    assert (done.returncode != 0) == killed, (done.stdout + done.stderr)[-3000:]
    assert (out / "fault-fired").exists() == killed
    slots: dict[int, dict[int, str]] = {}
    for file in sorted(out.glob("rank-*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            batch = slots.setdefault(line["draw"], {})
            assert batch.keys().isdisjoint(line["slots"]), f"draw {line['draw']}: two ranks took the same slot"
            batch.update(zip(line["slots"], line["keys"], strict=True))
    return {draw: [batch[s] for s in range(BATCH)] for draw, batch in sorted(slots.items()) if len(batch) == BATCH}


def test_the_keys_of_four_launches_with_kills_between_are_those_of_one_process(
    small_shards: Path, tmp_path: Path
) -> None:
    legs = [
        drawn(small_shards, tmp_path / "run", tmp_path / f"leg-{k}", processes=n, fault=fault, images=images)
        for k, (n, fault, images) in enumerate(LEGS)
    ]
    firsts = [min(leg) for leg in legs] + [max(legs[-1]) + 1]
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts)), "each launch went on later than the one before it began"
    whole: list[list[str]] = []
    for leg, first, end in zip(legs, firsts[:-1], firsts[1:], strict=True):
        assert list(leg)[: end - first] == list(range(first, end)), "no gap within a launch, up to where the next resumed"
        whole += [leg[draw] for draw in range(first, end)]
    alone = drawn(
        small_shards, tmp_path / "alone", tmp_path / "alone-out", processes=1, fault="record", images=IMAGES
    )
    assert whole == list(alone.values())
    keys = [key for batch in whole for key in batch]
    assert len(keys) == 2 * IMAGES
    for start in range(0, len(keys) - 699, 700):
        assert len(set(keys[start : start + 700])) == 700, "each pass shows each image once"
