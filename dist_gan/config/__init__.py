"""Settings of a run: typed sections, the reader of YAML files and overrides, and one report of all mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_gan.config.sections import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports the sections of settings when a name of this package is first asked for.

    The modules that define parts of the sections (networks, losses, optimizers) import `config.values`, and thus this
    package, before the sections exist.
    """
    import dist_gan.config.sections as sections

    if name in sections.__all__:
        return getattr(sections, name)
    raise AttributeError(f"module 'dist_gan.config' has no attribute {name!r}")
