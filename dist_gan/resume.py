"""State with which a run starts: from its newest checkpoint, from another run's weights, or from a healthy checkpoint.

A run is rolled back to its newest healthy checkpoint (one after which training continued without failure) when training
has failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_gan import records, storage
from dist_gan.checkpoint import reader, retention
from dist_gan.checkpoint.reader import SearchResult
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import RunConfig
from dist_gan.config.reader import read_written
from dist_gan.export import CONFIG, newest_checkpoint, read_weights
from dist_gan.models.own import described
from dist_gan.state import MAY_BEGIN_ANEW, TrainState
from dist_gan.types import TrainingFailed, UserError

KEPT_IN_ROLLBACK = ("stream", "recovery")
"""Parts of the state that a rollback does not restore: the position in the data, and the number of rollbacks made."""

_LEAST_SHARE = 0.5
"""Share of a network's parameters (numbers, not tensors); of at least one network, more has to fit `run.init_from`."""


class Resumed(NamedTuple):
    """Result of resuming a run: the checkpoint that was loaded, and notes for the user."""

    url: str | None
    """Checkpoint that the run resumes from; None for a new run."""
    notes: tuple[str, ...]
    """Notes for the user about damaged checkpoints that were skipped and weights that did not fit."""
    finished_rollback: bool
    """True if an interrupted rollback was found and completed, and now has to be committed by a new checkpoint."""


def resume(
    config: RunConfig, checkpointer: Checkpointer, state: TrainState, *, script: Mapping[str, Any] | None = None
) -> Resumed:
    """Loads the checkpoint or the weights with which the run starts into its state, if there are any. Collective.

    Args:
        config: every setting.
        checkpointer: reader and writer of the run's checkpoints.
        state: state of the run, as it is before the first image.
        script: record of the user's script that defines parts of the run; None without such parts.

    Raises:
        UserError: the checkpoint or the weights that the settings ask for are absent, damaged, or of another run.
        TrainingFailed: a rollback was interrupted, and there is no healthy checkpoint to complete it with.
    """
    wanted = config.run.resume
    if wanted not in ("auto", "never"):
        manifest = checkpointer.load(wanted, state.parts(), may_lack=MAY_BEGIN_ANEW)
        return Resumed(wanted, _notes(manifest, checkpointer, state, script), False)
    intent = checkpointer.intended_rollback()
    if intent is not None:
        retention.check_complete(intent, checkpointer.folder)
    found = checkpointer.newest()
    if found.url is None:
        notes = _warm_start(config.run.init_from, state) if config.run.init_from else ()
        return Resumed(None, notes, False)
    if wanted == "never":
        raise UserError(
            f"run.resume: 'never', but this run has the checkpoint {found.url}; choose another run.dir (and checkpoint.url), "
            f"or run.resume=auto to go on from it"
        )
    manifest = checkpointer.load(found.url, state.parts(), may_lack=MAY_BEGIN_ANEW)
    notes = (*_passed_over(found), *_notes(manifest, checkpointer, state, script))
    if intent is None:
        return Resumed(found.url, notes, False)
    if manifest["values"].get("recovery", {"rollbacks": 0})["rollbacks"] >= intent["recovery"]["rollbacks"]:
        return Resumed(found.url, notes, True)  # the rollback was complete, except that its intent was not removed
    target = checkpointer.newest(healthy=True, before=reader.serial_of(intent["target"]) + 1)
    if target.url is None:
        raise TrainingFailed(_no_way_back("a rollback was cut off", target))
    _go_back(checkpointer, state, target.url, intent)
    return Resumed(target.url, (*notes, *_passed_over(target), "finished a rollback that was cut off"), True)


def _passed_over(found: SearchResult) -> tuple[str, ...]:
    return tuple(f"passed over a damaged checkpoint: {text}" for text in found.damaged)


def _notes(
    manifest: dict[str, Any], checkpointer: Checkpointer, state: TrainState, script: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Returns notes for the user about differences between this start and the start that wrote the checkpoint."""
    notes = (*_unknown_settings(manifest), *_begun_anew(manifest, state), *_not_bitwise(manifest, checkpointer))
    before, now = manifest.get("script"), script
    if (before is None and now is None) or (isinstance(before, dict) and now and before.get("sha256") == now["sha256"]):
        return notes
    return (*notes, f"the checkpoint was written with {described(before)}, and {described(now)} goes on")


def _begun_anew(manifest: Mapping[str, Any], state: TrainState) -> tuple[str, ...]:
    """Returns a note for each part of the run's state that the checkpoint lacks."""
    lacking = [part for part in state.parts() if reader.prefix_of(manifest, part) is None]
    if not state.memory and "objective" in lacking:  # this objective keeps no state, so nothing begins anew
        lacking.remove("objective")
    return tuple(f"the checkpoint holds no state of the part {part!r}, which begins anew" for part in lacking)


def _unknown_settings(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a note for each setting in a checkpoint that this version of the program does not know."""
    _, unknown = (
        read_written(manifest["config"], place="the checkpoint's configuration") if "config" in manifest else ((), [])
    )
    return tuple(f"the checkpoint has the setting {name}, which this version does not know" for name in unknown)


def _no_way_back(reason: str, found: SearchResult) -> str:
    damaged = f" ({'; '.join(found.damaged)})" if found.damaged else ""
    return (
        f"{reason}; there is no healthy checkpoint to go back to{damaged}: lower the learning rate or raise the penalties, "
        f"and start anew in another run.dir"
    )


def _not_bitwise(manifest: dict[str, Any], checkpointer: Checkpointer) -> tuple[str, ...]:
    """Returns a note if the resumed run will not be bitwise equal to an uninterrupted run.

    The results differ by rounding if gradients are summed in another order than when the checkpoint was written.
    """
    now = checkpointer.order_of_sums
    before = {name: manifest.get(name) for name in now}
    if any(before[name] != now[name] for name in ("world_size", "strategy")):
        return (
            f"the checkpoint is of {before['world_size']} processes ({before['strategy']}), and {now['world_size']} "
            f"({now['strategy']}) go on: from here on the numbers are those of an unbroken run to rounding, not bit for bit",
        )
    layouts = before["gradient_layout"], now["gradient_layout"]
    if layouts[0] is None or layouts[0] == layouts[1]:  # earlier versions did not record the layout
        return ()
    return (
        f"gradients are summed in another order than before ({layouts[0]}, now {layouts[1]}): from here on the numbers are "
        f"those of an unbroken run to rounding, not bit for bit; torch {manifest.get('torch')} and the launch file of the "
        f"checkpoint give its order again",
    )


def roll_back(checkpointer: Checkpointer, state: TrainState, *, reason: str) -> str:
    """Takes the run back to its newest healthy checkpoint; returns the checkpoint's URL. Collective.

    The caller has to save a new checkpoint before training continues.

    Raises:
        TrainingFailed: there is no healthy checkpoint.
    """
    found = checkpointer.newest(healthy=True)
    if found.url is None:
        raise TrainingFailed(_no_way_back(reason, found))
    target = found.url
    state.recovery.rolled_back()
    intent = {"recovery": state.recovery.values(), "stream": state.stream.values(), "seconds": state.progress.seconds}
    if checkpointer.is_writer:
        checkpointer.intend_rollback(target, intent)
    _go_back(checkpointer, state, target, intent)
    return target


def _go_back(checkpointer: Checkpointer, state: TrainState, url: str, intent: dict[str, Any]) -> None:
    """Does the part of a rollback that can be repeated: marks newer checkpoints as abandoned, and loads the state.

    Args:
        checkpointer: reader and writer of the run's checkpoints.
        state: state of the run.
        url: checkpoint to go back to.
        intent: values of the parts that the rollback does not restore, as recorded when the rollback began.
    """
    if checkpointer.is_writer:
        checkpointer.abandon_after(url)
    parts = {name: part for name, part in state.parts().items() if name not in KEPT_IN_ROLLBACK}
    checkpointer.load(url, parts, may_lack=MAY_BEGIN_ANEW)
    state.recovery.load_values(intent["recovery"])
    state.stream.load_values(intent["stream"])
    state.progress.seconds = float(intent["seconds"])


def _warm_start(url: str, state: TrainState) -> tuple[str, ...]:
    """Loads the weights of another run or of an exported generator, as far as names and shapes fit; returns notes.

    The averaged generator of the source initialises both the generator and its average, so that training continues from
    the generator whose samples users have seen. At least one of the two networks has to receive more than half of its
    parameters, counted in numbers, not in tensors: a bias or a last layer that happens to fit is not enough.

    Raises:
        UserError: there is nothing at the URL, or neither network would receive more than half of its parameters.
    """
    source, notes = _weights_at(url)
    lines, shares, fitting = [], [], {}
    for player, prefix in ((state.generator, "generator/"), (state.discriminator, "discriminator/")):
        own = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in player.full_tensors()
            if not name.startswith("optimizer/")
        }
        taken, wrong, numbers = 0, [], {True: 0, False: 0}
        for name, tensor in own.items():
            theirs = source.get(prefix + name.split("/", 1)[1])
            fits = theirs is not None and theirs.shape == tensor.shape
            if name.startswith("weights/"):
                numbers[fits] += tensor.numel()
            if theirs is None:
                wrong.append(f"{name.split('/', 1)[1]} is not there")
            elif not fits:
                wrong.append(f"{name.split('/', 1)[1]} is {tuple(theirs.shape)}, not {tuple(tensor.shape)}")
            else:
                own[name] = theirs.to(tensor.dtype)
                taken += 1
        fitting[player.name] = own
        shares.append(numbers[True] / max(1, sum(numbers.values())))
        detail = f" ({'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''})" if wrong else ""
        lines.append(
            f"run.init_from: {player.name}: {taken} of {len(own)} tensors taken, {100 * shares[-1]:.0f}% of its "
            f"weights{detail}"
        )
    if max(shares) <= _LEAST_SHARE:
        raise UserError(
            f"run.init_from: {storage.redact(url)} does not fit these networks: of neither player more than "
            f"{100 * _LEAST_SHARE:.0f}% of the weights are there in their shape ({'; '.join(lines)}); choose the networks of "
            f"that run, or leave run.init_from out"
        )
    for player in (state.generator, state.discriminator):
        player.load_full_tensors(fitting[player.name])
    averaged = {name.split("/", 1)[1]: tensor for name, tensor in fitting[state.generator.name].items()}
    state.ema.load_tensors({name: averaged[name] for name in state.ema.table()})
    return (*notes, *lines)


def _weights_at(url: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Reads the weights and buffers at a URL; returns them by `generator/NAME` or `discriminator/NAME`, and notes."""
    if records.names_in(url, (CONFIG,)):
        exported = read_weights(url)
        return {f"generator/{name}": tensor for name, tensor in exported.tensors.items()}, exported.notes
    place = newest_checkpoint(url)
    _, tensors = reader.read(str(place.url))
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == "ema":
            found[f"generator/{rest}"] = tensor
        elif part == "discriminator" and not rest.startswith("optimizer/"):
            found[f"discriminator/{rest.partition('/')[2]}"] = tensor
    return found, tuple(f"run.init_from: {note}" for note in place.damaged)
