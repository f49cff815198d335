"""Exceptions that end a program with one sentence for the user."""

from __future__ import annotations

from dist_gan import wording


class _Told(Exception):
    """Base class of exceptions shown to users; secrets and control characters are removed from the text on creation.

    Args:
        sentence: one line; a line break in it is escaped, since it comes from a value from outside.
        more: further lines, shown indented.
    """

    def __init__(self, sentence: object = "", *more: object) -> None:
        super().__init__(*(wording.safe(line) for line in (sentence, *more)))

    def __str__(self) -> str:
        return wording.lines(self.args)


class UserError(_Told, ValueError):
    """A mistake of the user, described in one sentence with its place, its value and a remedy. The exit code is 2."""


class TrainingFailed(_Told, RuntimeError):
    """A failure of the training that starting the same command again would repeat. The exit code is 3."""
