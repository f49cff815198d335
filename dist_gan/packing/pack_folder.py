"""State of a pack in its destination: the plan file, the manifest of a finished pack, and files left by a killed one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from dist_gan import storage
from dist_gan.data import manifest as manifests
from dist_gan.data.manifest import Manifest, check_shards, read_manifest
from dist_gan.json_text import parse_json
from dist_gan.packing.destinations import OWNER, Destination
from dist_gan.packing.image_source import ImageShape
from dist_gan.types import UserError

PLAN = ".pack-plan.json"
SKIPPED = "skipped.txt"


def find_finished_pack(
    folder: Destination, names: Mapping[str, int | None], plan: str, say: Callable[[str], None]
) -> Manifest | None:
    """The manifest, if a pack of the same plan has been finished in the folder; None if there is no manifest.

    Args:
        folder: destination of the pack.
        names: files in the folder and their sizes.
        plan: hash of the source and the options.
        say: called with a message for the user.

    Raises:
        UserError: the folder holds the shards of another pack, or a shard is missing or has another size.
        TrainingFailed: the store does not answer.
    """
    if manifests.NAME not in names:
        return None
    found = read_manifest(folder.url)
    if not found.origin.endswith(f"(plan {plan})"):
        raise UserError(
            f"destination {folder.url}: holds {found.num_samples:,} images from another pack ({found.origin}), or the "
            f"source or an option has changed since; choose another folder, or empty this one first"
        )
    check_shards(folder.url, found)
    # The pack may have been killed after it wrote the manifest and before it removed these files.
    remove_leftovers(folder, names)
    left_out = f" (without the images in {SKIPPED})" if SKIPPED in names else ""
    say(f"{folder.url}: already packed: {found.num_samples:,} images in {len(found.shards)} shards{left_out}")
    return found


def read_plan(folder: Destination, names: Mapping[str, int | None], plan: str) -> ImageShape | None:
    """Shape of the images in the plan file of an interrupted pack; None if the folder is empty or absent.

    Raises:
        UserError: the folder holds other files, or an unfinished pack with another plan.
        TrainingFailed: the store does not answer.
    """
    size = names.get(PLAN)
    if size is None:
        foreign = sorted(name for name in names if not is_stray(name) and name != OWNER)
        if foreign:
            raise UserError(
                f"destination {folder.url}: is not empty ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}) and "
                f"no pack was begun there; choose another folder, empty this one, or run `dist-gan index` if these "
                f"are shards already"
            )
        return None
    ((_, data),) = folder.read_each({PLAN: size})
    try:
        content = parse_json(data or b"")
        same = content["plan"] == plan
        shape = ImageShape(content["resolution"], content["channels"])
        if any(type(value) is not int for value in shape) or shape.resolution < 1 or shape.channels not in (1, 3):
            raise ValueError("it holds no size of images")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"destination {folder.url}: {PLAN} cannot be read ({error}); empty the folder first") from error
    if not same:
        raise UserError(
            f"destination {folder.url}: holds an unfinished pack of another source or with other options; give the same "
            f"as then to finish it, choose another folder, or empty this one"
        )
    return shape


def write_plan(folder: Destination, plan: str, shape: ImageShape) -> None:
    """Writes the plan file, by which a later start of the same pack recognises the folder and continues."""
    content = {"plan": plan, **shape._asdict()}
    storage.publish(storage.join(folder.url, PLAN), json.dumps(content).encode("ascii"))


def is_stray(name: str) -> bool:
    """Returns whether a file name is that of a temporary file of a pack, which only a killed process leaves behind."""
    ours = name.startswith((".shard-", f".{PLAN}.", f".{manifests.NAME}.", f".{SKIPPED}.", "..shard-"))
    return ours and name.endswith(".tmp")


def remove_leftovers(folder: Destination, names: Mapping[str, int | None]) -> None:
    """Deletes the files that only an unfinished pack needs. The plan file is deleted last: with it the folder can be resumed."""
    folder.remove(name for name in names if is_stray(name) or (name.startswith(".shard-") and name.endswith(".json")))
    folder.remove([OWNER] if OWNER in names else [])
    folder.remove([PLAN] if PLAN in names else [])
