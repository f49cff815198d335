"""Exported generators, independent of their run: `model.safetensors` and `config.json` in a folder.

The files of such a folder, or of a checkpoint, may come from an untrusted source. Networks are therefore built without
memory first (torch's meta device), and their shapes compared with those in the file's header; only then is memory
allocated.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dist_gan import records, storage
from dist_gan.checkpoint import reader, tensorfile
from dist_gan.checkpoint.reader import ABANDONED, COMMIT, SearchResult
from dist_gan.config import NetworksSection
from dist_gan.config.reader import read_written
from dist_gan.models import build_generator
from dist_gan.models.family import NetworkSettings
from dist_gan.records import Record
from dist_gan.types import TensorFacts, UserError, check_table

FORMAT, VERSION = "dist_gan.generator", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FILE_NAME = re.compile(r"[^.].*\.(?!v\d+$)([A-Za-z][A-Za-z0-9]{0,11}|7z|3gp)")
"""Pattern of a file name with an extension; does not match `run-0.5` or `generator.v2`."""


class Averaged(NamedTuple):
    """An averaged generator, in evaluation mode, on the CPU, with facts about it."""

    module: nn.Module
    section: NetworkSettings
    images: int
    """Number of images that its run had seen."""
    class_names: tuple[str, ...] | None
    """Name of each class; None if there are no classes, or if the names were not recorded."""
    notes: tuple[str, ...]
    """Sentences for the user, about damaged checkpoints that were skipped and unknown settings."""


def newest_checkpoint(url: str) -> SearchResult:
    """The checkpoint at a URL, or the newest undamaged one of a run folder, and the damage found in newer ones.

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


def open_generator(url: str) -> Averaged:
    """The averaged generator of a run folder, a checkpoint or an exported generator.

    Raises:
        UserError: there is no generator, or it is damaged.
        TrainingFailed: the store does not answer.
    """
    if records.names_in(url, (CONFIG,)):
        return _exported(url)
    found = newest_checkpoint(url)
    place = str(found.url)
    manifest = reader.read_manifest(place)
    where = f"the settings in {storage.redact(place)}/manifest.json"
    if "config" not in manifest:
        raise UserError(f"{where} are missing; take another checkpoint")
    config, unknown = read_written(manifest["config"], place=where, needed="networks")
    class_names = _fitting(manifest.get("classes"), config.networks)
    module = _room(config.networks, reader.announced(manifest, prefix="ema/"), place=place)
    _, tensors = reader.read(place, prefix="ema/")
    _fill(module, {name.removeprefix("ema/"): tensor for name, tensor in tensors.items()})
    notes = [f"{where}: this version does not know {name}" for name in unknown if name.startswith("networks.")]
    return Averaged(module, config.networks, manifest["images"], class_names, (*found.damaged, *notes))


def export_generator(url: str, dest: str) -> Averaged:
    """Writes the averaged generator of a run folder or checkpoint into a new folder, and returns it.

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
    found = open_generator(url)
    try:
        storage.make_folder(dest)
    except OSError as error:
        raise UserError(f"{storage.redact(dest)}: cannot be written: {storage.why(error)}") from error
    storage.publish(storage.join(dest, WEIGHTS), tensorfile.to_bytes(dict(found.module.state_dict())))
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "images": found.images,
        "networks": found.section.model_dump(mode="json"),
        "classes": found.class_names,
    }
    storage.publish(storage.join(dest, CONFIG), (json.dumps(facts, indent=1) + "\n").encode())
    return found


def load_generator(url: str) -> nn.Module:
    """An exported generator, in evaluation mode, on the CPU: `generator(latents_BZ, labels_B) -> images_BCHW`.

    The attribute `latent_dim` is the length of a latent of standard normal numbers; labels are needed only if the
    generator was trained with classes.

    Raises:
        UserError: the folder holds no exported generator, or its files are damaged.
        TrainingFailed: the store does not answer.
    """
    found = _exported(url)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found.module


def refuse_file_name(dest: str, *, offered: str) -> None:
    """Raises UserError if a destination has the name of a file of another kind; a `/` at its end marks a folder."""
    name = dest.rsplit("/", 1)[-1]
    local = storage.local_path(dest)
    if _FILE_NAME.fullmatch(name) and not (local is not None and local.is_dir()):
        kind = name.rsplit(".", 1)[-1]
        raise UserError(
            f"{storage.redact(dest)}: files of the kind .{kind} are not written; give {offered}, with a / at its end if "
            f"its name has to be like this"
        )


def _exported(url: str) -> Averaged:
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
        module = _room(section, announced, place=url)
        _fill(module, tensorfile.from_bytes(records.read(file, limit=size), name=WEIGHTS))
    except UserError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{place}: the weights cannot be read ({error}){remedy}") from error
    images = facts.whole("images") if "images" in facts else 0
    return Averaged(module, section, images, _fitting(names, section), notes)


def _section_in(facts: Record, *, place: str) -> tuple[NetworkSettings, tuple[str, ...]]:
    """Networks section of an export, and notes that name keys unknown to this version, which are left out."""
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
    """Names of the classes; None if their number is not the number of classes."""
    return tuple(names) if names is not None and len(names) == section.classes else None


def _room(section: NetworkSettings, announced: Mapping[str, TensorFacts], *, place: str) -> nn.Module:
    """A generator with uninitialised weights, allocated after its shapes have been compared with those of the file.

    Raises:
        UserError: names or shapes differ.
    """
    problem: Exception | None = None
    try:
        if getattr(section, "depth", 0) > len(announced):  # building a layer takes time even without memory
            raise ValueError(
                f"{section.kind} of depth {getattr(section, 'depth', 0):,} has more tensors than are there"
            )
        with torch.device("meta"):
            module = build_generator(section)
        check_table(
            "the generator",
            announced,
            {n: TensorFacts(tuple(t.shape), t.dtype) for n, t in module.state_dict().items()},
        )
        dtype = next((facts.dtype for facts in announced.values() if facts.dtype.is_floating_point), torch.float32)
        return module.to(dtype).to_empty(device="cpu")
    except (ValueError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        problem = error
    text = " ".join(str(problem).split())[:300]
    raise UserError(f"{storage.redact(place)}: the weights do not fit the networks ({text})") from problem


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict(tensors)
    module.eval().requires_grad_(False)
