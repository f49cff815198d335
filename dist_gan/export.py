"""Exported generators, independent of their run: `model.safetensors` and `config.json` in a folder.

The files of an exported generator, or of a checkpoint, may come from an untrusted source. Networks are therefore first
built without memory (on torch's meta device), and their shapes are compared with the shapes in the file's header. Memory
is allocated only if all shapes are equal.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dist_gan import records, storage
from dist_gan.checkpoint import reader, tensorfile
from dist_gan.checkpoint.reader import ABANDONED, COMMIT, SearchResult
from dist_gan.config import NetworksSection
from dist_gan.config.reader import read_written
from dist_gan.models import build_generator, build_networks
from dist_gan.models.family import NetworkSettings
from dist_gan.models.own import OwnBuilder, OwnNetworks, described
from dist_gan.records import Record
from dist_gan.types import TensorFacts, UserError, check_table
from dist_gan.wording import shown

FORMAT, VERSION = "dist_gan.generator", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FILE_NAME = re.compile(r"[^.].*\.(?!v\d+$)([A-Za-z][A-Za-z0-9]{0,11}|7z|3gp)")
"""Pattern of a file name with an extension, such as `model.onnx`, but not of names such as `run-0.5` or `generator.v2`."""


class AveragedWeights(NamedTuple):
    """Weights and buffers of an averaged generator on the CPU, by name, with facts about that generator."""

    tensors: Mapping[str, Tensor]
    module: nn.Module | None
    """Generator network into which the weights fit; None if a user's function built the network and was not given."""
    section: NetworkSettings
    images: int
    """Number of images that the generator's run had seen."""
    class_names: tuple[str, ...] | None
    """Name of each class; None if there are no classes, or if the names were not recorded."""
    script: Any
    """Name and hash of the user's script that defined networks, losses or metrics; None without such a script."""
    notes: tuple[str, ...]
    """Sentences for the user, about damaged checkpoints that were skipped and unknown settings."""


class Averaged(NamedTuple):
    """An averaged generator, in evaluation mode, on the CPU, with facts about that generator."""

    module: nn.Module
    section: NetworkSettings
    images: int
    """Number of images that the generator's run had seen."""
    class_names: tuple[str, ...] | None
    """Name of each class; None if there are no classes, or if the names were not recorded."""
    notes: tuple[str, ...]
    """Sentences for the user, about damaged checkpoints that were skipped and unknown settings."""


def newest_checkpoint(url: str) -> SearchResult:
    """Finds the checkpoint at a URL, or the newest undamaged one in a run folder; returns its URL and notes for the user.

    The notes describe damage found in newer checkpoints, or say that the checkpoint was abandoned by a rollback.

    Args:
        url: URL of a checkpoint or of a run folder.

    Raises:
        UserError: there is no usable checkpoint.
        TrainingFailed: the store does not answer.
    """
    local = storage.local_path(url)
    if local is not None and local.is_file():
        raise UserError(f"{storage.redact(url)}: is a file; give a run folder or a checkpoint, which are folders")
    names = records.names_in(url, ("manifest.json", COMMIT, ABANDONED))
    if names - {ABANDONED}:
        note = f"{storage.redact(url)} is abandoned: a rollback went back behind it"
        return SearchResult(url, (note,) if ABANDONED in names else ())
    found = reader.newest(storage.join(url, "checkpoints"))
    if found.url is None:
        damaged = f" ({'; '.join(found.damaged)})" if found.damaged else ""
        raise UserError(
            f"{storage.redact(url)}: no committed checkpoint here{damaged}; give a run folder or a checkpoint"
        )
    return SearchResult(found.url, tuple(f"passed over a damaged checkpoint: {text}" for text in found.damaged))


def open_generator(url: str, *, build: OwnBuilder | None = None) -> Averaged:
    """Opens the averaged generator of a run folder, a checkpoint or an exported generator.

    Args:
        url: URL of the folder.
        build: the function that built the networks of a user's own script.

    Raises:
        UserError: there is no generator, its files are damaged, or a user's function built it and `build` is missing.
        TrainingFailed: the store does not answer.
    """
    return _filled(read_weights(url, build=build), url)


def _filled(found: AveragedWeights, url: str) -> Averaged:
    """Loads the weights into the generator; returns the generator in evaluation mode.

    Raises:
        UserError: a user's function built the network, and was not given.
    """
    if found.module is None:
        names = found.script.get("parts") if isinstance(found.script, dict) else None
        built = names.get("networks") if isinstance(names, dict) else None
        raise UserError(
            f"{storage.redact(url)}: its networks were built by {shown(built or 'a function')} in {described(found.script)}; "
            f"export it with `dist-gan export`, and open that in Python with dist_gan.load_generator(folder, build=function)"
        )
    found.module.load_state_dict(found.tensors)
    found.module.eval().requires_grad_(False)
    return Averaged(found.module, found.section, found.images, found.class_names, found.notes)


def read_weights(url: str, *, build: OwnBuilder | None = None) -> AveragedWeights:
    """Reads the weights of an averaged generator, and compares names and shapes with the network if it can be built.

    Args:
        url: a run folder, a checkpoint or an exported generator.
        build: the function that built the networks of a user's own script.

    Raises:
        UserError: there is no generator, or its files are damaged.
        TrainingFailed: the store does not answer.
    """
    if records.names_in(url, (CONFIG,)):
        return _exported(url, build)
    found = newest_checkpoint(url)
    place = str(found.url)
    manifest = reader.read_manifest(place)
    where = f"the settings in {storage.redact(place)}/manifest.json"
    if "config" not in manifest:
        raise UserError(f"{where} are missing; take another checkpoint")
    config, unknown = read_written(manifest["config"], place=where, needed="networks")
    class_names = _fitting(manifest.get("classes"), config.networks)
    module = _room(config.networks, reader.announced(manifest, prefix="ema/"), place=place, build=build)
    _, tensors = reader.read(place, prefix="ema/")
    notes = [f"{where}: this version does not know {name}" for name in unknown if name.startswith("networks.")]
    return AveragedWeights(
        {name.removeprefix("ema/"): tensor for name, tensor in tensors.items()},
        module,
        config.networks,
        manifest["images"],
        class_names,
        manifest.get("script"),
        (*found.damaged, *notes),
    )


def export_generator(url: str, dest: str) -> tuple[str, ...]:
    """Writes the averaged generator of a run folder or checkpoint into a new folder; returns notes for the user.

    Args:
        url: the run folder or checkpoint.
        dest: the new folder.

    Raises:
        UserError: there is no checkpoint, or the destination already holds files or has the name of a file.
        TrainingFailed: the destination cannot be written.
    """
    refuse_file_name(dest, offered="a new folder, into which model.safetensors and config.json are written")
    try:
        is_new = not storage.list_names(dest)
    except OSError as error:
        raise UserError(f"{storage.redact(dest)}: cannot be written: {storage.why(error)}") from error
    if not is_new:
        raise UserError(f"{storage.redact(dest)}: is not empty; give a new folder")
    found = read_weights(url)
    try:
        storage.make_folder(dest)
    except OSError as error:
        raise UserError(f"{storage.redact(dest)}: cannot be written: {storage.why(error)}") from error
    storage.publish(storage.join(dest, WEIGHTS), tensorfile.to_bytes(dict(found.tensors)))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "images": found.images,
        "networks": found.section.model_dump(mode="json"),
        "classes": found.class_names,
    }
    if found.script is not None:
        facts["script"] = found.script
    storage.publish(storage.join(dest, CONFIG), (json.dumps(facts, indent=1) + "\n").encode())
    return found.notes


def load_generator(url: str, *, build: OwnBuilder | None = None) -> nn.Module:
    """Loads an exported generator; returns it in evaluation mode, on the CPU.

    The generator is called as `generator(latents_BZ, labels_B) -> images_BCHW`. A latent holds `generator.latent_dim`
    standard normal numbers; labels are needed only if the generator was trained with classes.

    Args:
        url: URL of the folder of the exported generator.
        build: the function that built the networks of a user's own script, as passed to `dist_gan.train`. The function
            is called with the settings in the folder, and allocates networks of the sizes in these settings.

    Raises:
        UserError: the folder holds no exported generator, or its files are damaged.
        TrainingFailed: the store does not answer.
    """
    found = _filled(_exported(url, build), url)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found.module


def refuse_file_name(dest: str, *, offered: str) -> None:
    """Raises UserError if the URL of a new folder looks like that of a file, such as `model.onnx`.

    A `/` at the end of the URL marks a folder in any case.

    Args:
        dest: URL of the destination.
        offered: words of the error for what may be given instead.
    """
    name = dest.rsplit("/", 1)[-1]
    local = storage.local_path(dest)
    if _FILE_NAME.fullmatch(name) and not (local is not None and local.is_dir()):
        kind = name.rsplit(".", 1)[-1]
        raise UserError(
            f"{storage.redact(dest)}: files of the kind .{kind} are not written; give {offered}, with a / at its end if "
            f"its name has to be like this"
        )


def _exported(url: str, build: OwnBuilder | None) -> AveragedWeights:
    place, file = storage.redact(url), storage.join(url, WEIGHTS)
    remedy = "; export the generator again"
    try:
        facts = records.load(storage.join(url, CONFIG), remedy=remedy, limit=2**20)
    except FileNotFoundError as error:
        raise UserError(f"{place}: holds no exported generator; make one with `dist-gan export RUN DEST`") from error
    if facts.values.get("format") != FORMAT:
        raise UserError(f"{place}: {CONFIG} is not that of an exported generator")
    if facts.values.get("version") != VERSION:
        raise UserError(
            f"{place}: {CONFIG} is of version {facts.values.get('version')!r:.80}, and this program reads version "
            f"{VERSION}{remedy}"
        )
    section, notes = _section_in(facts, place=place)
    names = facts.texts("classes") if facts.values.get("classes") is not None else None
    try:
        size = records.size(file)
        head = records.read(file, 0, tensorfile.header_bytes(records.read(file, 0, 8), size=size, name=WEIGHTS))
        announced = {name: entry.facts for name, entry in tensorfile.read_header(head, size=size, name=WEIGHTS).items()}
        module = _room(section, announced, place=url, build=build)
        tensors = tensorfile.from_bytes(records.read(file, limit=size), name=WEIGHTS)
    except UserError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{place}: the weights cannot be read ({error}){remedy}") from error
    images = facts.whole("images") if "images" in facts else 0
    script = facts.values.get("script")
    return AveragedWeights(tensors, module, section, images, _fitting(names, section), script, notes)


def _section_in(facts: Record, *, place: str) -> tuple[NetworkSettings, tuple[str, ...]]:
    """Returns the networks section of an exported generator, and a note for each setting unknown to this version."""
    values = dict(facts.record("networks").values)
    try:
        return TypeAdapter(NetworksSection).validate_python(values), ()
    except ValidationError as error:
        unknown = [str(e["loc"][-1]) for e in error.errors() if e["type"] == "extra_forbidden" and len(e["loc"]) <= 2]
    notes = tuple(f"{place}: this version does not know the setting {name!r:.80} of the networks" for name in unknown)
    try:
        section: NetworkSettings = TypeAdapter(NetworksSection).validate_python(
            {name: value for name, value in values.items() if name not in unknown}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {CONFIG} cannot be read (networks.{where}: {first['msg']})") from error
    return section, notes


def _fitting(names: list[str] | None, section: NetworkSettings) -> tuple[str, ...] | None:
    """Returns the class names of the data if their number equals `networks.classes` of the run; None otherwise."""
    return tuple(names) if names is not None and len(names) == section.classes else None


def _room(
    section: NetworkSettings, announced: Mapping[str, TensorFacts], *, place: str, build: OwnBuilder | None
) -> nn.Module | None:
    """Builds a generator whose tensors have the names and shapes of a file's; returns it without the file's weights.

    A built-in network is allocated only after the comparison with the file, and its weights are not initialised. A
    user's own function is called as in training, since it may make tensors that no file holds.

    Args:
        section: networks section of the settings.
        announced: shapes and dtypes in the file's header, by the name of the tensor.
        place: URL of the folder, for error messages.
        build: the function that built the networks of a user's own script.

    Returns:
        The generator; None if a user's own function built the network and `build` is missing.

    Raises:
        UserError: names or shapes of the network and of the file differ.
    """
    if isinstance(section, OwnNetworks) and build is None:
        return None
    problem: Exception | None = None
    try:
        if getattr(section, "depth", 0) > len(announced):  # building a layer takes time even without memory
            raise ValueError(
                f"{section.kind} of depth {getattr(section, 'depth', 0):,} has more tensors than are there"
            )
        if isinstance(section, OwnNetworks):
            module = build_networks(section, seed=0, own=build).generator
        else:
            with torch.device("meta"):
                module = build_generator(section)
        check_table(
            "the generator",
            announced,
            {n: TensorFacts(tuple(t.shape), t.dtype) for n, t in module.state_dict().items()},
        )
        dtype = next((facts.dtype for facts in announced.values() if facts.dtype.is_floating_point), torch.float32)
        return module.to(dtype) if isinstance(section, OwnNetworks) else module.to(dtype).to_empty(device="cpu")
    except UserError:
        raise
    except (ValueError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        problem = error
    text = " ".join(str(problem).split())[:300]
    raise UserError(f"{storage.redact(place)}: the weights do not fit the networks ({text})") from problem
