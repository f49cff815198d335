"""Where a run goes on from: the newest checkpoint, another run's weights, or a healthy checkpoint after a failure."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_gan import checkpoint_format, storage, tensorfile
from dist_gan.checkpoint import Checkpointer
from dist_gan.config import RunConfig
from dist_gan.export import newest_checkpoint
from dist_gan.state import TrainState
from dist_gan.types import TrainingFailed, UserError

KEPT_IN_ROLLBACK = ("stream", "recovery")
"""What a rollback does not take back: the draws go on, and the budget is spent."""


class Resumed(NamedTuple):
    """What a run begins with."""

    url: str | None
    """Checkpoint that it goes on from; None if it begins anew."""
    notes: tuple[str, ...]
    """What the person who watches should know: damaged checkpoints that were passed over, weights that did not fit."""
    finished_rollback: bool
    """Whether a rollback that was cut off has been done again and has to be committed."""


def resume(config: RunConfig, checkpointer: Checkpointer, state: TrainState) -> Resumed:
    """Puts into the state what the run goes on from. Collective.

    Raises:
        UserError: what was asked for is not there, is damaged, or belongs to another run.
    """
    wanted = config.run.resume
    if wanted not in ("auto", "never"):
        manifest = checkpointer.load(wanted, state.parts())
        return Resumed(wanted, _not_bitwise(manifest, checkpointer), False)
    intent = checkpointer.intended_rollback()
    found = checkpointer.newest()
    if found.url is None:
        notes = _warm_start(config.run.init_from, state) if config.run.init_from else ()
        return Resumed(None, notes, False)
    if wanted == "never":
        raise UserError(
            f"run.resume: 'never', but {config.run.dir} holds the checkpoint {found.url}; choose another run.dir, "
            f"or run.resume=auto to go on from it"
        )
    manifest = checkpointer.load(found.url, state.parts())
    notes = tuple(f"passed over a damaged checkpoint: {text}" for text in found.damaged)
    notes += _not_bitwise(manifest, checkpointer)
    if intent is None:
        return Resumed(found.url, notes, False)
    if manifest["values"]["recovery"]["rollbacks"] >= intent["recovery"]["rollbacks"]:
        return Resumed(found.url, notes, True)  # only the note of it had not been removed
    url = storage.join(checkpointer.folder, intent["target"])
    _go_back(checkpointer, state, url, intent)
    return Resumed(url, (*notes, "finished a rollback that was cut off"), True)


def _not_bitwise(manifest: dict[str, Any], checkpointer: Checkpointer) -> tuple[str, ...]:
    """Why the run will not have the bits of one that was never interrupted: it sums over ranks in another order."""
    now = checkpointer.order_of_sums
    before = {name: manifest.get(name) for name in now}
    if any(before[name] != now[name] for name in ("world_size", "strategy")):
        return (
            f"the checkpoint is of {before['world_size']} processes ({before['strategy']}), and {now['world_size']} "
            f"({now['strategy']}) go on: from here on the numbers are those of an unbroken run to rounding, not bit for bit",
        )
    layouts = before["gradient_layout"], now["gradient_layout"]
    if layouts[0] is None or layouts[0] == layouts[1]:  # checkpoints of earlier versions say nothing of it
        return ()
    return (
        f"gradients are summed in another order than before ({layouts[0]}, now {layouts[1]}): from here on the numbers are "
        f"those of an unbroken run to rounding, not bit for bit; torch {manifest.get('torch')} and the launch file of the "
        f"checkpoint give its order again",
    )


def roll_back(checkpointer: Checkpointer, state: TrainState, *, reason: str) -> str:
    """Takes the run back to its newest healthy checkpoint; returns its URL. Save before training goes on. Collective.

    Raises:
        TrainingFailed: there is no healthy checkpoint.
    """
    checkpointer.drain()
    target = checkpointer.newest(healthy=True).url
    if target is None:
        raise TrainingFailed(
            f"{reason}; there is no healthy checkpoint to go back to: lower the learning rate or raise the penalties, "
            f"and start anew in another run.dir"
        )
    state.recovery.rolled_back()
    intent = {"recovery": state.recovery.values(), "stream": state.stream.values(), "seconds": state.progress.seconds}
    if checkpointer.is_writer:
        checkpointer.intend_rollback(target, intent)
    _go_back(checkpointer, state, target, intent)
    return target


def _go_back(checkpointer: Checkpointer, state: TrainState, url: str, intent: dict[str, Any]) -> None:
    """The part of a rollback that can be done again: marks, weights, counters."""
    if checkpointer.is_writer:
        checkpointer.abandon_after(url)
    parts = {name: part for name, part in state.parts().items() if name not in KEPT_IN_ROLLBACK}
    checkpointer.load(url, parts)
    state.recovery.load_values(intent["recovery"])
    state.stream.load_values(intent["stream"])
    state.progress.seconds = float(intent["seconds"])


def _warm_start(url: str, state: TrainState) -> tuple[str, ...]:
    """Takes the weights of another run or of an exported generator, as far as names and shapes fit; says what did.

    The averaged generator of the source becomes generator and average, so that training goes on from the samples that
    were seen; the source's own generator is that of one moment.

    Raises:
        UserError: there is nothing at the URL, or nothing of it fits.
    """
    source = _weights_at(url)
    lines, fitted = [], 0
    for player, prefix in ((state.generator, "generator/"), (state.discriminator, "discriminator/")):
        own = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in player.full_tensors()
            if not name.startswith("optimizer/")
        }
        taken, wrong = 0, []
        for name in own:
            theirs = source.get(prefix + name.split("/", 1)[1])
            if theirs is None:
                wrong.append(f"{name.split('/', 1)[1]} is not there")
            elif theirs.shape != own[name].shape:
                wrong.append(f"{name.split('/', 1)[1]} is {tuple(theirs.shape)}, not {tuple(own[name].shape)}")
            else:
                own[name] = theirs.to(own[name].dtype)
                taken += 1
        player.load_full_tensors(own)
        if player is state.generator:
            averaged = {name.split("/", 1)[1]: tensor for name, tensor in own.items()}
            state.ema.load_tensors({name: averaged[name] for name in state.ema.table()})
        fitted += taken
        detail = f" ({'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''})" if wrong else ""
        lines.append(f"run.init_from: {player.name}: {taken} of {len(own)} tensors taken{detail}")
    if fitted == 0:
        raise UserError(f"run.init_from: no tensor of {storage.redact(url)} fits these networks; {lines[0]}")
    return tuple(lines)


def _weights_at(url: str) -> dict[str, Tensor]:
    """Weights and buffers by player and name."""
    if storage.exists(storage.join(url, "config.json")):
        data = storage.read(storage.join(url, "model.safetensors"))
        try:
            tensors = tensorfile.from_bytes(data, name="model.safetensors")
        except ValueError as error:
            raise UserError(f"run.init_from: {storage.redact(url)}: {error}") from error
        return {f"generator/{name}": tensor for name, tensor in tensors.items()}
    place = newest_checkpoint(url)
    _, tensors = checkpoint_format.read(place)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == "ema":
            found[f"generator/{rest}"] = tensor
        elif part == "discriminator" and not rest.startswith("optimizer/"):
            found[f"discriminator/{rest.split('/', 1)[1]}"] = tensor
    return found
