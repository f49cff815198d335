"""Restores the parts of a run (networks, optimizers, progress) from a checkpoint, after comparing the settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from dist_gan import storage
from dist_gan.checkpoint.reader import ANOTHER, prefix_of
from dist_gan.config.reader import differences, read_written
from dist_gan.types import HasTensors, HasValues, Part, UserError


def refuse_other_settings(url: str, manifest: Mapping[str, Any], config: str | None) -> None:
    """Compares the settings stored in a checkpoint with the settings of the present run.

    `config` holds the present settings as YAML; None skips the comparison.

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
    url: str,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Part],
    *,
    may_lack: Collection[str] = (),
) -> None:
    """Loads tensors and values of a checkpoint into the parts of a run; parts that it may lack stay as they are.

    Args:
        url: URL of the checkpoint, for messages.
        manifest: the checkpoint's manifest.
        tensors: the checkpoint's tensors by name.
        parts: parts of the run by name.
        may_lack: parts that the checkpoint may lack.

    Raises:
        UserError: the checkpoint lacks a part that it may not lack, or its tensors do not fit a part.
    """
    prefixes = {part: prefix_of(manifest, part) for part in parts}
    lacking = sorted(part for part, prefix in prefixes.items() if prefix is None and part not in may_lack)
    if lacking:
        raise UserError(f"{storage.redact(url)}: does not hold {', '.join(lacking)}; take another checkpoint")
    for part, state in parts.items():
        prefix = prefixes[part]
        if prefix is None:
            continue
        try:
            if isinstance(state, HasTensors):
                state.load_tensors({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            if isinstance(state, HasValues):
                state.load_values(manifest["values"][part])
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{storage.redact(url)} does not fit this run: {error}") from error
