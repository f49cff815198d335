"""What is done about skipped updates, against a plain count of the whole history."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dist_gan.config import RecoverySection
from dist_gan.health.recovery import Action, Recovery
from dist_gan.runtime import Update

NAN = float("nan")


def good(player: str = "generator") -> Update:
    return Update(player, 1.0, True, None)


def bad(player: str = "generator") -> Update:
    return Update(player, NAN, False, f"{player}/out.weight")


def after(watched: Recovery, *updates: Update) -> Action:
    """The action after a step with these updates."""
    return watched.decide(watched.watch(updates))


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
            action = after(watched, good() if applied else bad())
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
        assert after(watched, bad("generator")).kind == "continue"
        assert after(watched, bad("discriminator")).kind == "continue"
    assert watched.skipped == {"generator": 2, "discriminator": 2}
    assert after(watched, bad("generator")).kind == "roll_back"
    assert watched.skipped == {"generator": 3, "discriminator": 2}


def test_many_updates_of_one_player_do_not_age_the_skips_of_the_other() -> None:
    watched = recovery(window=4, max_nonfinite=2)
    after(watched, bad("generator"))
    for _ in range(50):
        after(watched, good("discriminator"))
    assert not watched.quiet
    assert after(watched, bad("generator")).kind == "roll_back"


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_the_budget_is_spent_one_rollback_at_a_time_and_then_the_run_ends(budget: int) -> None:
    watched = recovery(window=10, max_nonfinite=2, rollbacks=budget)
    for spent in range(budget):
        assert after(watched, bad("discriminator")).kind == "continue", "a new window begins with each rollback"
        assert after(watched, bad("discriminator")).kind == "roll_back"
        watched.rolled_back()
        assert watched.rollbacks == spent + 1
        assert watched.quiet
    after(watched, bad("discriminator"))
    end = after(watched, bad("discriminator"))
    assert end.kind == "stop"
    assert f"gone back {budget} times" in end.reason
    assert "d_optim.clip" in end.reason
    assert watched.skipped["discriminator"] == 2 * (budget + 1), "a rollback does not take the count back"


@pytest.mark.parametrize("at", range(8))
def test_a_restart_in_between_changes_nothing(at: int) -> None:
    whole, resumed = recovery(window=4, max_nonfinite=3), recovery(window=4, max_nonfinite=3)
    kinds, kinds_of_resumed = [], []
    for number, update in enumerate(bad() if skipped == "b" else good() for skipped in "bggbgbbgb"):
        kinds.append(after(whole, update).kind)
        kinds_of_resumed.append(after(resumed, update).kind)
        if number == at:
            values, resumed = resumed.values(), recovery(window=4, max_nonfinite=3)
            resumed.load_values(values)
    assert kinds == kinds_of_resumed
    assert whole.values() == resumed.values()
    assert "roll_back" in kinds


def test_an_update_counts_for_the_player_whose_it_is() -> None:
    watched = recovery(max_nonfinite=100)
    d, g = "discriminator", "generator"
    assert watched.watch([bad(d), good(d), bad(d), good(g)]) is None
    assert watched.skipped == {d: 2, g: 0}
    watched.watch([good(d), bad(g)])
    assert watched.skipped == {d: 2, g: 1}


def test_of_several_verdicts_in_a_step_the_first_counts_and_every_update_is_noted() -> None:
    d, g = "discriminator", "generator"
    watched = recovery(window=10, max_nonfinite=1, rollbacks=5)
    found = after(watched, bad(d), good(d), good(g))
    assert found.kind == "roll_back", "a good update after it does not undo it"
    assert "of the discriminator" in found.reason
    assert watched.values()["updates"] == {d: 2, g: 1}
    both = after(recovery(window=10, max_nonfinite=1, rollbacks=5), bad(d), bad(g))
    assert "of the discriminator" in both.reason
    ended = after(recovery(window=10, max_nonfinite=1, rollbacks=0), good(d), bad(g))
    assert ended.kind == "stop"
    assert "g_optim.clip" in ended.reason
