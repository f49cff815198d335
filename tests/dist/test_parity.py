"""One process, two and four give the same weights: same images, same latents, same sums."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dist_gan import tensorfile
from tests.conftest import launch
from tests.dist.cases import cases

WORKER = Path(__file__).with_name("parity_worker.py")
BIASED = ("minimax", "nonsaturating", "hinge", "least_squares")
"""In the other losses a constant added to every logit cancels, so the last bias of D has no gradient."""


@pytest.fixture(scope="module")
def trained(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What 1, 2 and 4 processes made of every case."""
    out = tmp_path_factory.mktemp("parity")
    folders = {}
    for processes in (1, 2, 4):
        folders[processes] = out / str(processes)
        done = launch(WORKER, [str(small_shards), str(folders[processes])], processes=processes, timeout_s=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def _load(folder: Path, name: str, when: str) -> dict[str, torch.Tensor]:
    slug = name.replace("/", "_").replace(" ", "-")
    return tensorfile.from_bytes((folder / f"{slug}.{when}").read_bytes(), name=name)


def _largest_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a if a[k].is_floating_point())


@pytest.mark.parametrize("name", list(cases("unread", world_size=1)))
def test_two_and_four_processes_give_the_weights_of_one(trained: dict[int, Path], name: str) -> None:
    alone = _load(trained[1], name, "end")
    for processes in (2, 4):
        assert _largest_error(alone, _load(trained[processes], name, "end")) <= 1e-9, processes


@pytest.mark.parametrize("name", list(cases("unread", world_size=1)))
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
        for processes in (2, 4):
            assert reports[processes][name]["keys"] == alone["keys"], (name, processes)
            assert reports[processes][name]["latents"] == alone["latents"], (name, processes)
            for term, value in alone["scalars"].items():
                assert reports[processes][name]["scalars"][term] == pytest.approx(value, rel=1e-9, abs=1e-9), term


def test_without_the_reduction_the_weights_differ(
    trained: dict[int, Path], small_shards: Path, tmp_path: Path
) -> None:
    done = launch(WORKER, [str(small_shards), str(tmp_path), "--unreduced"], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    name = "relativistic/r1+r2/plain"
    assert _largest_error(_load(trained[1], name, "end"), _load(tmp_path, name, "end")) > 1e-4
