"""The folder of a pack: whose it is, how far it has come, and what a kill has left there."""

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
    """The manifest of a finished pack of this plan, among the names in the folder."""
    if manifests.NAME not in names:
        return None
    found = read_manifest(folder.url)
    if not found.origin.endswith(f"(plan {plan})"):
        raise UserError(
            f"destination {folder.url}: holds {found.num_samples:,} images from another pack ({found.origin}), or the "
            f"source or an option has changed since; choose another folder, or empty this one first"
        )
    check_shards(folder.url, found)
    # A kill may have come between the manifest and the end.
    remove_leftovers(folder, names)
    left_out = f" (without the images in {SKIPPED})" if SKIPPED in names else ""
    say(f"{folder.url}: already packed: {found.num_samples:,} images in {len(found.shards)} shards{left_out}")
    return found


def read_plan(folder: Destination, names: Mapping[str, int | None], plan: str) -> ImageShape | None:
    """What an interrupted pack of this plan had shape; None for a folder that is empty or not there.

    Raises:
        UserError: the folder holds something else.
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
    """From here on the folder belongs to this pack."""
    content = {"plan": plan, **shape._asdict()}
    storage.publish(storage.join(folder.url, PLAN), json.dumps(content).encode("ascii"))


def is_stray(name: str) -> bool:
    """Whether a kill has left a file of this name half."""
    ours = name.startswith((".shard-", f".{PLAN}.", f".{manifests.NAME}.", f".{SKIPPED}.", "..shard-"))
    return ours and name.endswith(".tmp")


def remove_leftovers(folder: Destination, names: Mapping[str, int | None]) -> None:
    """Removes what only an unfinished pack needs; the plan goes last."""
    folder.remove(name for name in names if is_stray(name) or (name.startswith(".shard-") and name.endswith(".json")))
    folder.remove([OWNER] if OWNER in names else [])
    folder.remove([PLAN] if PLAN in names else [])
