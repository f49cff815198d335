"""Two processes agree: on gradients that are not finite, on buffers, on what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import launch

WORKER = Path(__file__).with_name("runtime_worker.py")


@pytest.fixture(scope="module")
def reports(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("runtime")
    done = launch(WORKER, [str(small_shards), str(out)], processes=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_bad_image_on_one_rank_skips_the_update_on_all_and_leaves_everything_as_it_was(reports: list[dict]) -> None:
    for report in reports:
        assert [d for d, _ in report["applied"]] == [True, True, True, False, True, True]
        assert [same for same, _ in report["unchanged"]] == [False, False, False, True, False, False]
        assert report["unchanged"][3] == [True, True], "weights and the objective's memory"
        assert report["unchanged"][2] == [False, False]
        assert report["skipped"] == {"discriminator": 1, "generator": 0}
        assert report["finite"], "running statistics, moments and averages too"


def test_the_scalars_of_a_skipped_update_do_not_reach_the_log(reports: list[dict]) -> None:
    assert all(value == value for value in reports[0]["scalars"].values())
    assert reports[0]["scalars"] == reports[1]["scalars"]


def test_batch_norm_statistics_are_equal_on_all_ranks(reports: list[dict]) -> None:
    # the worker's comparison of all tensors would have ended it
    assert reports[0]["batch_norm_buffers"] > 0


def test_rows_are_gathered_in_slot_order(reports: list[dict]) -> None:
    for report in reports:
        assert report["gathered"] == [10.0 * slot for slot in range(32)]


def test_values_are_shared_without_pickling(reports: list[dict]) -> None:
    for report in reports:
        assert [part["rank"] for part in report["json"]] == [0, 1]
        assert [len(part["text"]) for part in report["json"]] == [1, 51]
        assert report["shared"] == ["from", 0]
        assert report["any"] == [True, False]


def test_a_corrupted_replica_is_named_by_its_tensor_and_rank(reports: list[dict]) -> None:
    for report in reports:
        assert "tensor discriminator/weights/head.linear.weight on rank 1" in report["corrupted"]


def test_what_goes_wrong_on_one_rank_is_raised_on_all(reports: list[dict]) -> None:
    assert {report["agreed"] for report in reports} == {"rank 1: no disk left"}
