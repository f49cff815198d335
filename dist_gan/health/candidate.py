"""The rule that makes a checkpoint healthy: no failure was seen shortly before it, nor between it and the next
checkpoint.
"""

from __future__ import annotations


class HealthCandidate:
    """Holds the newest checkpoint until the next one shows whether training continued without failure."""

    def __init__(self) -> None:
        self._url: str | None = None

    def proven(self, *, quiet: bool) -> str | None:
        """Returns the candidate's URL if no failure was seen up to the next checkpoint; None otherwise.

        Args:
            quiet: True if no failure was seen lately.
        """
        return self._url if quiet else None

    def replace(self, url: str, *, quiet: bool) -> None:
        """Makes the checkpoint at `url` the candidate if `quiet`, that is, if no failure was seen lately."""
        self._url = url if quiet else None

    def drop(self) -> None:
        """Removes the candidate, because a rollback has abandoned that checkpoint."""
        self._url = None
