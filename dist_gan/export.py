"""A generator that needs nothing of the run it came from: `model.safetensors` and `config.json` in a folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from dist_gan import checkpoint_format, storage, tensorfile
from dist_gan.config import NetworksSection, RunConfig
from dist_gan.models import build_generator
from dist_gan.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def newest_checkpoint(url: str) -> str:
    """The checkpoint itself, or the newest undamaged one of a run folder.

    Raises:
        UserError: there is none.
    """
    if storage.exists(storage.join(url, "manifest.json")):
        return url
    found = checkpoint_format.newest(storage.join(url, "checkpoints"))
    if found.url is None:
        damaged = f" ({'; '.join(found.damaged)})" if found.damaged else ""
        raise UserError(
            f"{storage.redact(url)}: no committed checkpoint here{damaged}; give a run folder or a checkpoint"
        )
    return found.url


def generator_of(url: str) -> tuple[nn.Module, Any, int]:
    """The averaged generator of a run folder or checkpoint, its networks section, and the images seen."""
    place = newest_checkpoint(url)
    manifest, tensors = checkpoint_format.read(place, prefix="ema/")
    config = RunConfig.model_validate(yaml.safe_load(manifest["config"]))
    generator = build_generator(config.networks)
    _load(generator, {n.removeprefix("ema/"): t for n, t in tensors.items()}, place=place)
    return generator, config.networks, int(manifest["images"])


def export_generator(url: str, dest: str) -> None:
    """Writes the averaged generator of a run folder or checkpoint into a new folder.

    Raises:
        UserError: there is no checkpoint, or the destination holds files already.
    """
    if storage.list_names(dest):
        raise UserError(f"{storage.redact(dest)}: is not empty; give a new folder")
    generator, section, images = generator_of(url)
    storage.make_folder(dest)
    storage.publish(storage.join(dest, "model.safetensors"), tensorfile.to_bytes(dict(generator.state_dict())))
    facts = {
        "format": "dist_gan.generator",
        "version": 1,
        "images": images,
        "networks": section.model_dump(mode="json"),
    }
    storage.publish(storage.join(dest, "config.json"), (json.dumps(facts, indent=1) + "\n").encode())


def load_generator(url: str) -> nn.Module:
    """An exported generator, in evaluation mode, on the CPU: `generator(latents_BZ, labels_B) -> images_BCHW`.

    Its `latent_dim` says how many standard normal numbers a latent has; labels only if it was trained with classes.

    Raises:
        UserError: the folder holds no exported generator.
    """
    generator = build_generator(section_of(url))
    try:
        data = storage.read(storage.join(url, "model.safetensors"))
        tensors = tensorfile.from_bytes(data, name="model.safetensors")
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{storage.redact(url)}: the weights cannot be read ({error}); export the generator again"
        ) from error
    _load(generator, tensors, place=url)
    return generator


def section_of(url: str) -> Any:
    """The networks section of an exported generator.

    Raises:
        UserError: the folder holds no exported generator.
    """
    place = storage.redact(url)
    try:
        facts = json.loads(storage.read(storage.join(url, "config.json")))
        if not isinstance(facts, dict) or facts.get("format") != "dist_gan.generator":
            raise UserError(f"{place}: config.json is not that of an exported generator")
        return TypeAdapter(NetworksSection).validate_python(facts["networks"])
    except FileNotFoundError as error:
        raise UserError(f"{place}: holds no exported generator; make one with `dist-gan export RUN DEST`") from error
    except (ValidationError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{place}: config.json cannot be read ({str(error).splitlines()[0]})") from error


def _load(generator: nn.Module, tensors: dict[str, Tensor], *, place: str) -> None:
    try:
        dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        generator.to(dtype).load_state_dict(tensors)
    except (RuntimeError, StopIteration) as error:
        raise UserError(f"{storage.redact(place)}: the weights do not fit the networks ({str(error)[:300]})") from error
    generator.eval().requires_grad_(False)
