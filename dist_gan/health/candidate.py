"""The rule by which a checkpoint becomes healthy: nothing was wrong before it, nor until the next checkpoint."""

from __future__ import annotations


class HealthCandidate:
    """The newest checkpoint, until it is known whether training went on well from it."""

    def __init__(self) -> None:
        self._url: str | None = None

    def proven(self, *, quiet: bool) -> str | None:
        """The candidate, if training has been quiet up to now, where the next checkpoint is taken; None otherwise.

        Args:
            quiet: True if no failure was seen lately.
        """
        return self._url if quiet else None

    def replace(self, url: str, *, quiet: bool) -> None:
        """Makes a new checkpoint the candidate, unless a failure was seen lately."""
        self._url = url if quiet else None

    def drop(self) -> None:
        """Forgets the candidate, which a rollback has abandoned."""
        self._url = None
