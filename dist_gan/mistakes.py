"""The exceptions that end a run with a sentence for the user."""

from __future__ import annotations

from dist_gan import wording


class _Told(Exception):
    """An exception whose text is shown to people, and is safe from the moment it is made.

    Args:
        sentence: one line; a line break in it came from outside and is escaped.
        more: further lines, shown indented.
    """

    def __init__(self, sentence: object = "", *more: object) -> None:
        super().__init__(*(wording.safe(line) for line in (sentence, *more)))

    def __str__(self) -> str:
        return wording.lines(self.args)


class UserError(_Told, ValueError):
    """A mistake in what the user gave: place, value and remedy in one sentence. Exit code 2."""


class TrainingFailed(_Told, RuntimeError):
    """Training failed and the same command would fail again. Exit code 3."""
