"""Pictures from a trained generator, as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dist_gan import images as pictures
from dist_gan import storage
from dist_gan.draws import Draws
from dist_gan.evaluate import sample, to_pictures
from dist_gan.export import generator_of, load_generator, section_of
from dist_gan.types import UserError


def write_samples(
    url: str, dest: str, *, count: int, seed: int = 0, label: int | None = None, steps: int = 0
) -> Iterator[str]:
    """Writes a grid (`dest` ends in .png) or single PNGs (a folder); yields a line for each thing written.

    Args:
        url: run folder, checkpoint, or exported generator.
        dest: file or folder.
        count: pictures; with `steps`, rows of them.
        seed: of the latents.
        label: class of every picture; by default a conditional generator goes through its classes.
        steps: pictures in each row of an interpolation between two latents, 0 for none.

    Raises:
        UserError: there is no generator, or no such class.
    """
    if count < 1:
        raise UserError(f"--count: {count} is no number of pictures; give 1 or more")
    if storage.exists(storage.join(url, "config.json")):
        generator, section = load_generator(url), section_of(url)
    else:
        generator, section, _ = generator_of(url)
        generator = generator.float()
    classes = int(section.classes)
    if label is not None and not 0 <= label < classes:
        raise UserError(
            f"--label: {label}, but the generator knows {classes} classes; give 0 to {classes - 1}"
            if classes
            else f"--label: {label}, but the generator was trained without classes; leave it out"
        )
    draws = Draws(seed)
    if steps:
        images = _interpolated(generator, draws, rows=count, steps=steps, classes=classes, label=label)
        columns = steps
    else:
        parts = sample(generator, draws, slots=torch.arange(count), classes=classes, label=label)
        images = to_pictures(torch.cat(list(parts)))
        columns = max(1, round(len(images) ** 0.5))
    try:
        if dest.lower().endswith(".png"):
            Path(dest).parent.mkdir(parents=True, exist_ok=True)
            pictures.write_png(dest, pictures.grid(images, columns=columns))
            yield f"{dest}: {len(images)} pictures"
            return
        folder = Path(dest)
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            pictures.write_png(str(folder / f"sample-{number:06d}.png"), image)
        yield f"{folder}: {len(images)} pictures"
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {storage.why(error)}") from error


@torch.no_grad()
def _interpolated(
    generator: torch.nn.Module, draws: Draws, *, rows: int, steps: int, classes: int, label: int | None
) -> pictures.Pixels:
    """Rows that walk along the great circle from one latent to another, of one class each."""
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
