"""Restores the parts of a run from a checkpoint, after a comparison of the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dist_gan import storage
from dist_gan.checkpoint.reader import ANOTHER
from dist_gan.config.reader import differences, read_written
from dist_gan.types import Stateful, UserError


def refuse_other_settings(url: str, manifest: Mapping[str, Any], config: str | None) -> None:
    """Compares the settings in a checkpoint with those of this run; None as `config` compares nothing.

    Raises:
        UserError: the settings are missing, or differ where a resumed run has to keep them.
    """
    mine, theirs = config, manifest.get("config")
    if mine is None or mine == theirs:
        return
    place = storage.redact(url)
    if theirs is None:
        raise UserError(f"{place} is damaged: its manifest.json has no settings{ANOTHER}")
    before, _ = read_written(theirs, place=f"the settings in {place}/manifest.json")
    changed = differences(before, read_written(mine, place="the settings of this run")[0])
    if changed:
        raise UserError(
            f"{place} belongs to a run with other settings ({'; '.join(changed)}); start with the settings of that run, "
            f"or take its weights alone: run.init_from={place} in another run.dir"
        )


def restore(
    url: str, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: Mapping[str, Stateful]
) -> None:
    """Gives every part its tensors and values from a checkpoint.

    Raises:
        UserError: the checkpoint lacks a part, or its tensors do not fit the part.
    """
    lacking = parts.keys() - manifest["values"].keys()
    if lacking:
        raise UserError(f"{storage.redact(url)}: does not hold {', '.join(sorted(lacking))}; take another checkpoint")
    for part, state in parts.items():
        prefix = f"{part}/"
        try:
            state.load_tensors({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            state.load_values(manifest["values"][part])
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{storage.redact(url)} does not fit this run: {error}") from error
