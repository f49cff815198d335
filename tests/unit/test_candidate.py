"""When a checkpoint counts as healthy, against the whole history of what was seen before and after it."""

from __future__ import annotations

import random

import pytest

from dist_gan.health.candidate import HealthCandidate


@pytest.mark.parametrize("seed", range(5))
def test_a_checkpoint_is_proven_at_the_next_one_if_training_was_quiet_at_both(seed: int) -> None:
    chance, candidate = random.Random(seed), HealthCandidate()
    quiet = [chance.random() < 0.6 for _ in range(40)]
    proven = []
    for number, is_quiet in enumerate(quiet):
        proven.append(candidate.proven(quiet=is_quiet))
        candidate.replace(f"checkpoint-{number}", quiet=is_quiet)
    assert proven[0] is None
    for number in range(1, 40):
        expected = f"checkpoint-{number - 1}" if quiet[number - 1] and quiet[number] else None
        assert proven[number] == expected, number


def test_a_checkpoint_that_a_rollback_has_abandoned_is_never_proven() -> None:
    candidate = HealthCandidate()
    candidate.replace("checkpoint-1", quiet=True)
    candidate.drop()
    assert candidate.proven(quiet=True) is None
    candidate.replace("checkpoint-2", quiet=True)
    assert candidate.proven(quiet=True) == "checkpoint-2"
