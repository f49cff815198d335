"""Recovery from failures of the training by a limited number of rollbacks, whose counters a rollback does not reset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dist_gan.checkpoint import schema
from dist_gan.config import RecoverySection
from dist_gan.health.monitor import Verdict
from dist_gan.records import Record
from dist_gan.runtime import Update
from dist_gan.types import Knobs

PLAYERS = schema.PLAYERS


class Action(NamedTuple):
    """Decision of the recovery about a verdict; every rank reaches the same decision, since it has the same verdict."""

    kind: Literal["continue", "roll_back", "stop"]
    reason: str = ""
    """Evidence for the failure; for `stop` also the remedy."""


CONTINUE = Action("continue")


class Recovery:
    """Counts skipped updates, and decides whether the run continues, rolls back or stops.

    Args:
        section: length of the window of updates, largest number of skipped updates in it, and number of rollbacks.
    """

    def __init__(self, section: RecoverySection) -> None:
        self._section = section
        self.rollbacks = 0
        """Number of rollbacks since the start of the run."""
        self.skipped: dict[str, int] = dict.fromkeys(PLAYERS, 0)
        """Number of skipped updates of each player, whose gradient was not finite, since the start of the run."""
        self._updates: dict[str, int] = dict.fromkeys(PLAYERS, 0)
        self._recent: dict[str, list[int]] = {player: [] for player in PLAYERS}

    @property
    def quiet(self) -> bool:
        """True if none of the latest updates (`recovery.window`) was skipped."""
        return not any(self._recent.values())

    def soften(self, knobs: Knobs) -> Knobs:
        """Returns the settings of the next step: those of the schedules, unchanged, since a rollback changes no
        setting.
        """
        return knobs

    def watch(self, updates: Sequence[Update]) -> Verdict | None:
        """Counts the updates of a step; returns a verdict if too many of a player's latest updates were skipped."""
        verdicts = [self._count(update) for update in updates]
        return next((verdict for verdict in verdicts if verdict is not None), None)

    def _count(self, update: Update) -> Verdict | None:
        player = update.player
        self._updates[player] += 1
        recent = self._recent[player]
        while recent and recent[0] <= self._updates[player] - self._section.window:
            recent.pop(0)
        if update.applied:
            return None
        recent.append(self._updates[player])
        self.skipped[player] += 1
        if len(recent) < self._section.max_nonfinite:
            return None
        return Verdict(
            "nonfinite",
            f"{len(recent)} of the last {min(self._section.window, self._updates[player])} updates of the {player} had a "
            f"gradient that is not finite, last in {update.culprit}",
            f"lower the learning rate, raise the penalties or set {player[0]}_optim.clip",
        )

    def decide(self, verdict: Verdict | None) -> Action:
        """Returns the action on a verdict: a rollback as long as the number of rollbacks allows, then the end of the
        run.
        """
        if verdict is None:
            return CONTINUE
        if self.rollbacks < self._section.rollbacks:
            return Action("roll_back", verdict.reason)
        return Action(
            "stop",
            f"{verdict.reason}; the run has gone back {self.rollbacks} times (recovery.rollbacks), so starting again would "
            f"not help: {verdict.remedy}, in another run.dir",
        )

    def rolled_back(self) -> None:
        """Counts one rollback, and empties the windows of skipped updates."""
        self.rollbacks += 1
        self._recent = {player: [] for player in PLAYERS}

    # -- state ----------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """Returns the counters and the windows of skipped updates as JSON values."""
        return {
            "rollbacks": self.rollbacks, "skipped": dict(self.skipped), "updates": dict(self._updates),
            "recent": {player: list(numbers) for player, numbers in self._recent.items()},
        }  # fmt: skip

    def load_values(self, values: dict[str, Any]) -> None:
        """Restores counters and windows from what `values` returned.

        Raises:
            ValueError: a value has another type or range.
        """
        schema.check_recovery(Record(values, place="recovery"))
        self.rollbacks = int(values["rollbacks"])
        self.skipped = {player: values["skipped"][player] for player in PLAYERS}
        self._updates = {player: values["updates"][player] for player in PLAYERS}
        self._recent = {player: list(values["recent"][player]) for player in PLAYERS}
