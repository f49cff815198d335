"""One process, two and four give the same weights under every strategy: same images, same latents, same sums.

The cases and the worker are those of benchmarks/parity.py, which runs all of them under every strategy.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.parity import compare, launch_file
from benchmarks.parity_cases import loss_cases
from benchmarks.parity_worker import slug
from dist_gan.checkpoint import tensorfile
from tests.conftest import ROOT, launch

WORKER = ROOT / "benchmarks" / "parity_worker.py"
BIASED = ("minimax", "nonsaturating", "hinge", "least_squares")
"""In the other losses a constant added to every logit cancels, so the last bias of D has no gradient."""


STEPS = ("--steps", "9")
"""Lazy penalties three times; the benchmark trains twenty."""
CASES = tuple(loss_cases("unread", world_size=1))
OF_FOUR = CASES[::3]
"""What four processes train, which share two cores here: every loss, every penalty, with and without accumulation."""


@pytest.fixture(scope="module")
def trained(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What 1 and 2 processes made of every case, and 4 of every third."""
    out = tmp_path_factory.mktemp("parity")
    folders = {}
    for processes in (1, 2, 4):
        folders[processes] = out / str(processes)
        arguments = [str(small_shards), str(folders[processes]), "losses", *STEPS, *(_only(OF_FOUR) if processes == 4 else [])]
        done = launch(WORKER, arguments, processes=processes, timeout_s=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def _load(folder: Path, name: str, when: str) -> dict[str, torch.Tensor]:
    return tensorfile.from_bytes((folder / f"{slug(name)}.{when}").read_bytes(), name=name)


def _largest_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a if a[k].is_floating_point())


@pytest.mark.parametrize("name", CASES)
def test_two_and_four_processes_give_the_weights_of_one(trained: dict[int, Path], name: str) -> None:
    alone = _load(trained[1], name, "end")
    for processes in (2, 4) if name in OF_FOUR else (2,):
        assert _largest_error(alone, _load(trained[processes], name, "end")) <= 1e-9, processes


@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_moved_or_is_known_to_have_no_gradient(trained: dict[int, Path], name: str) -> None:
    start, end = _load(trained[1], name, "start"), _load(trained[1], name, "end")
    still = {
        key
        for key in start
        if "/weights/" in key and float((end[key] - start[key]).norm()) < 1e-3 * float(start[key].norm().clamp(min=1e-9))
    }
    loss = name.split("/")[0]
    known = set() if loss in BIASED else {"discriminator/weights/head.linear.bias"}
    assert still <= known, still


def test_the_same_images_and_latents_are_used_whatever_the_number_of_processes(trained: dict[int, Path]) -> None:
    reports = {p: json.loads((folder / "report.json").read_text()) for p, folder in trained.items()}
    for name, alone in reports[1].items():
        assert len(set(alone["keys"])) == 64
        for processes in (2, 4) if name in OF_FOUR else (2,):
            assert reports[processes][name]["keys"] == alone["keys"], (name, processes)
            assert reports[processes][name]["latents"] == alone["latents"], (name, processes)
            for term, value in alone["scalars"].items():
                assert reports[processes][name]["scalars"][term] == pytest.approx(value, rel=1e-9, abs=1e-9), term


def test_without_the_reduction_the_weights_differ(
    trained: dict[int, Path], small_shards: Path, tmp_path: Path
) -> None:
    name = "relativistic/r1+r2/plain"
    done = launch(WORKER, [str(small_shards), str(tmp_path), "losses", *STEPS, "--unreduced", "--only", name], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _largest_error(_load(trained[1], name, "end"), _load(tmp_path, name, "end")) > 1e-4


FAST = ("none/several", "r1/lazy", "r1+r2/accumulated", "wgan-gp/plain", "clipping", "spectral", "adamw")
"""What every stage is tested with here; the benchmark has all."""


@pytest.fixture(scope="module")
def reference(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process without a wrapper makes of the cases in float32."""
    out = tmp_path_factory.mktemp("strategies") / "single"
    done = launch(WORKER, [str(small_shards), str(out), "fp32", *_only(FAST)])
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def _only(names: tuple[str, ...]) -> list[str]:
    return [word for name in names for word in ("--only", name)]


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_every_stage_of_zero_gives_the_weights_of_one_process(
    strategy: str, reference: Path, small_shards: Path, tmp_path: Path
) -> None:
    names = FAST if "offload" not in strategy else FAST[2:3]
    file = launch_file(strategy, tmp_path)
    out = tmp_path / "out"
    arguments = [str(small_shards), str(out), "fp32", *_only(names)]
    done = launch(WORKER, arguments, processes=2, config_file=file, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "built successfully" not in done.stdout, "nothing is compiled when a run starts"
    for name in names:
        row = compare(reference, out, name)
        assert row["max_relative_error"] <= 1e-4, (name, row)
        assert row["max_abs_difference"] <= 1e-5, (name, row)
        assert row["smallest_movement"] >= 1e-3, (name, row)
