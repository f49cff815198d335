"""What is done about skipped updates, against a plain count of the whole history."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dist_gan.config import RecoverySection
from dist_gan.health.recovery import Recovery, actions
from dist_gan.runtime import Update

GOOD, BAD = Update(1.0, True, None), Update(float("nan"), False, "generator/out.weight")


def recovery(**settings: Any) -> Recovery:
    return Recovery(RecoverySection(**settings))


@pytest.mark.parametrize(("window", "most"), [(1, 1), (5, 1), (5, 3), (7, 2), (20, 20)])
def test_the_run_goes_back_when_so_many_of_the_last_updates_were_skipped_and_never_else(window: int, most: int) -> None:
    chance = random.Random(window * 100 + most)
    for share in (0.1, 0.3, 0.5, 0.9):
        watched = recovery(window=window, max_nonfinite=most, rollbacks=1000)
        history: list[bool] = []  # of this player, since the last rollback
        for update in range(300):
            applied = chance.random() > share
            history.append(not applied)
            action = watched.watch("generator", GOOD if applied else BAD)
            recent = sum(history[-window:])
            expected = "roll_back" if not applied and recent >= most else "continue"
            assert action.kind == expected, f"update {update}: {recent} of the last {window}"
            assert watched.quiet == (recent == 0)
            if action.kind == "roll_back":
                assert f"{recent} of the last {min(window, update + 1)} updates of the generator" in action.reason
                assert "generator/out.weight" in action.reason
                watched.rolled_back()
                history.clear()


def test_each_player_has_a_window_and_a_count_of_its_own() -> None:
    watched = recovery(window=10, max_nonfinite=3)
    for _ in range(2):
        assert watched.watch("generator", BAD).kind == "continue"
        assert watched.watch("discriminator", BAD).kind == "continue"
    assert watched.skipped == {"generator": 2, "discriminator": 2}
    assert watched.watch("generator", BAD).kind == "roll_back"
    assert watched.skipped == {"generator": 3, "discriminator": 2}


def test_many_updates_of_one_player_do_not_age_the_skips_of_the_other() -> None:
    watched = recovery(window=4, max_nonfinite=2)
    watched.watch("generator", BAD)
    for _ in range(50):
        watched.watch("discriminator", GOOD)
    assert not watched.quiet
    assert watched.watch("generator", BAD).kind == "roll_back"


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_the_budget_is_spent_one_rollback_at_a_time_and_then_the_run_ends(budget: int) -> None:
    watched = recovery(window=10, max_nonfinite=2, rollbacks=budget)
    for spent in range(budget):
        assert watched.watch("discriminator", BAD).kind == "continue", "a new window begins with each rollback"
        assert watched.watch("discriminator", BAD).kind == "roll_back"
        watched.rolled_back()
        assert watched.rollbacks == spent + 1
        assert watched.quiet
    watched.watch("discriminator", BAD)
    end = watched.watch("discriminator", BAD)
    assert end.kind == "stop"
    assert f"gone back {budget} times" in end.reason
    assert "d_optim.clip" in end.reason
    assert watched.skipped["discriminator"] == 2 * (budget + 1), "a rollback does not take the count back"


@pytest.mark.parametrize("at", range(8))
def test_a_restart_in_between_changes_nothing(at: int) -> None:
    pattern = [BAD, GOOD, GOOD, BAD, GOOD, BAD, BAD, GOOD, BAD]
    whole, resumed = recovery(window=4, max_nonfinite=3), recovery(window=4, max_nonfinite=3)
    kinds, kinds_of_resumed = [], []
    for number, update in enumerate(pattern):
        kinds.append(whole.watch("generator", update).kind)
        kinds_of_resumed.append(resumed.watch("generator", update).kind)
        if number == at:
            values, resumed = resumed.values(), recovery(window=4, max_nonfinite=3)
            resumed.load_values(values)
    assert kinds == kinds_of_resumed
    assert whole.values() == resumed.values()
    assert "roll_back" in kinds


def test_the_last_update_of_a_step_is_the_generators_and_the_others_the_discriminators() -> None:
    watched = recovery(max_nonfinite=100)
    assert actions(watched, [BAD, GOOD, BAD, GOOD]).kind == "continue"
    assert watched.skipped == {"discriminator": 2, "generator": 0}
    actions(watched, [GOOD, BAD])
    assert watched.skipped == {"discriminator": 2, "generator": 1}


def test_of_several_actions_in_a_step_the_gravest_counts_and_every_update_is_noted() -> None:
    watched = recovery(window=10, max_nonfinite=1, rollbacks=5)
    found = actions(watched, [BAD, GOOD, GOOD])
    assert found.kind == "roll_back", "a good update after it does not undo it"
    assert "of the discriminator" in found.reason
    assert watched.values()["updates"] == {"discriminator": 2, "generator": 1}
    both = actions(recovery(window=10, max_nonfinite=1, rollbacks=5), [BAD, BAD])
    assert "of the discriminator" in both.reason, "of two alike the first is named"
    ended = recovery(window=10, max_nonfinite=1, rollbacks=0)
    assert actions(ended, [GOOD, BAD]).kind == "stop"
