"""Sampling from a trained generator into picture files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from dist_gan import pictures, storage
from dist_gan.draws import Draws
from dist_gan.evaluate import sample, to_pictures
from dist_gan.export import Averaged, refuse_file_name
from dist_gan.types import UserError
from dist_gan.wording import shown

MAX_PICTURES = 100_000
"""Largest number of pictures of one command, which holds all of them in memory; the usual metrics take half as many."""
_NAMES_SHOWN = 20
OFFERED = "a name that ends in .png for a grid, or a folder for single PNGs"


def check_destination(dest: str) -> None:
    """Raises UserError if samples cannot be written to `dest`; called before a generator is opened."""
    if storage.local_path(dest) is None:
        raise UserError(f"{storage.redact(dest)}: samples are written to a disk of this machine; give {OFFERED}")
    if not _is_grid(dest):
        refuse_file_name(dest, offered=OFFERED)


def _is_grid(dest: str) -> bool:
    """True if a destination names one picture file; a `/` at its end makes it a folder."""
    return dest.lower().endswith(".png")


def class_of(label: str | int | None, source: Averaged) -> int | None:
    """Returns the class number of a label given by number or by name; None for no label.

    Raises:
        UserError: the generator has no such class.
    """
    if label is None:
        return None
    classes, names = int(source.section.classes), source.class_names
    if not classes:
        raise UserError(f"--label: {label!r}, but the generator was trained without classes; leave it out")
    if isinstance(label, int) or re.fullmatch(r"[0-9]{1,9}", label):
        number = int(label)
        if number >= classes or number < 0:
            raise UserError(
                f"--label: {number}, but the generator knows {classes} classes; give 0 to {classes - 1}{_named(names)}"
            )
        return number
    if names is None:
        raise UserError(
            f"--label: {label!r}, but names of the classes were not recorded; give a number from 0 to {classes - 1}"
        )
    if label not in names:
        raise UserError(f"--label: there is no class {label!r}; give 0 to {classes - 1}{_named(names)}")
    return names.index(label)


def _named(names: tuple[str, ...] | None) -> str:
    if names is None:
        return ""
    return f" or a name: {', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}"


def write_samples(
    source: Averaged, dest: str, *, count: int, seed: int = 0, label: str | int | None = None, steps: int = 0
) -> Iterator[str]:
    """Writes a grid (`dest` ends in .png) or single PNGs (a folder); yields a line for each thing written.

    Args:
        source: generator as returned by `export.open_generator`.
        dest: path of the file or folder.
        count: number of images; with `steps`, number of rows.
        seed: random seed of the latents.
        label: class of every image, by number or name; by default a conditional generator cycles through its classes.
        steps: images in each row of an interpolation between two latents; 0 for independent samples.

    Raises:
        UserError: the generator has no such class, or `dest` cannot be written.
    """
    check_destination(dest)
    if count < 1:
        raise UserError(f"--count: {count} is no number of pictures; give 1 or more")
    if steps < 0:
        raise UserError(f"--interpolate: {steps} is no number of pictures; give 1 or more, or leave it out")
    if count * max(1, steps) > MAX_PICTURES:
        raise UserError(
            f"{'--interpolate' if steps else '--count'}: {shown(count * max(1, steps))} pictures are more than are made at "
            f"once ({MAX_PICTURES:,}); give less, and another --seed for others"
        )
    generator, classes = source.module.float(), int(source.section.classes)
    number = class_of(label, source)
    of_class = "" if number is None else f" of class {number}"
    if number is not None and source.class_names is not None:
        of_class += f" ({source.class_names[number]})"
    draws = Draws(seed)
    if steps:
        images = _interpolated(generator, draws, rows=count, steps=steps, classes=classes, label=number)
        columns = steps
    else:
        parts = sample(generator, draws, slots=torch.arange(count), classes=classes, label=number)
        images = to_pictures(torch.cat(list(parts)))
        columns = max(1, round(len(images) ** 0.5))
    place = storage.local_path(dest) or Path(dest)
    try:
        if _is_grid(dest):
            place.parent.mkdir(parents=True, exist_ok=True)
            pictures.write_png(str(place), pictures.grid(images, columns=columns))
        else:
            place.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images):
                pictures.write_png(str(place / f"sample-{index:06d}.png"), image)
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {storage.why(error)}") from error
    yield f"{place}: {len(images)} pictures{of_class}"


@torch.no_grad()
def _interpolated(
    generator: torch.nn.Module, draws: Draws, *, rows: int, steps: int, classes: int, label: int | None
) -> pictures.Pixels:
    """Yields rows of pictures along the great circle from one latent to another; each row has one class."""
    latent_dim = int(generator.latent_dim)  # type: ignore[arg-type]
    ends = draws.normal("latents/samples", draw=0, slots=torch.arange(2 * rows), shape=(latent_dim,))
    start, end = ends[0::2, None], ends[1::2, None]
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=2).clamp(-1, 1).unsqueeze(2)
    angle, t = cosine.acos(), torch.linspace(0, 1, steps)[None, :, None]
    walk = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
    labels = None
    if classes:
        row_labels = torch.arange(rows) % classes if label is None else torch.full((rows,), label)
        labels = row_labels.repeat_interleave(steps)
    return to_pictures(generator(walk.flatten(0, 1), labels))
