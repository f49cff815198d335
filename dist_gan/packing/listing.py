"""Derives images, keys and labels from file names: selects image files, takes folders as classes, finds equal keys."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from dist_gan.packing.labels import numbered_classes, parse_label_file
from dist_gan.pictures import EXTENSIONS
from dist_gan.types import UserError

MAX_SHOWN = 10
LABEL_FILE = "dataset.json"
_LABEL_FILE_BYTES, _LABEL_BYTES = 2**20, 2**10
"""Largest size of a `dataset.json`, in bytes: a constant part, and a part per image."""
HIDDEN = "hidden files"
_KINDS_SHOWN = 20
_LONGEST_PATH, _DEEPEST_PATH = 4096, 64
"""Largest length of a path, in characters, and largest number of folders in it."""
_IGNORED = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
_SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")


class Entry(NamedTuple):
    """One image of a source."""

    key: str
    """Unique name: the path without common folders and extension, dots of the file name replaced by `_`."""
    label: int | None
    member: str
    """Path or member name by which the source's reader opens the image."""
    size: int
    """Size of the image in the source, in bytes."""


class File(NamedTuple):
    """A file in a folder or an archive: path and size in bytes."""

    path: str
    """Path relative to the folder or archive, with `/` as separator."""
    size: int


@dataclass(frozen=True)
class Listing:
    """The images found in a source, and the names of their classes."""

    entries: tuple[Entry, ...]
    """The images, sorted by key."""
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]
    """Sentences about files that were skipped."""


class Problems:
    """Collector of the mistakes in one source, which are reported together.

    Args:
        place: name of the source in the report.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._found: list[str] = []

    def add(self, sentence: str) -> None:
        """Adds a mistake, as a sentence without the name of the source."""
        self._found.append(sentence)

    def raise_if_any(self) -> None:
        """Raises UserError with the first mistakes and their number, if there are any."""
        if not self._found:
            return
        if len(self._found) == 1:
            raise UserError(f"{self._place}: {self._found[0]}")
        shown = [f"- {sentence}" for sentence in self._found[:MAX_SHOWN]]
        more = [f"and {len(self._found) - MAX_SHOWN} more"] if len(self._found) > MAX_SHOWN else []
        raise UserError(f"{self._place}: {len(self._found)} mistakes:", *shown, *more)


def list_images(
    files: Iterable[File],
    folders: Iterable[str],
    *,
    place: str,
    read: Callable[[str], bytes],
    left_out: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Listing:
    """Images among the files of a source, with labels from folders or from `dataset.json` if there are any.

    A common folder of all files is removed from the paths. The first folder of each remaining path is the class, and
    classes are numbered by their sorted names. Labels in a `dataset.json` of StyleGAN's format replace the folders.

    Args:
        files: all files of the source.
        folders: all folders, as relative paths, from which empty class folders are found.
        place: name of the source, for errors.
        read: returns the bytes of a file; used for `dataset.json`.
        left_out: paths that the source has already skipped, by reason.

    Raises:
        UserError: there are no images, or the files contain mistakes; all are in one report.
    """
    problems = Problems(place)
    images: list[File] = []
    label_files: list[File] = []
    others: Counter[str] = Counter()
    hidden: list[str] = []
    for file in files:
        extension = _extension(file.path)
        if _is_ignored(file.path):
            hidden.append(file.path)
        elif extension in EXTENSIONS:
            images.append(file)
        elif posixpath.basename(file.path) == LABEL_FILE:
            label_files.append(file)
        else:
            others[extension] += 1
    label_files.sort(key=lambda file: (len(file.path), file.path))
    others.update(_extension(file.path) for file in label_files[1:])
    notes = _notes(others, {HIDDEN: hidden, **left_out})
    if not images:
        found = f" ({notes[0]})" if notes else ""
        raise UserError(f"{place}: no images there{found}; images end in .{', .'.join(EXTENSIONS)}")
    root = _common_root([image.path for image in images], [f for f in folders if not _is_ignored(f)])
    classes: tuple[str, ...] | None
    if label_files:
        label_file = label_files[0]
        base = posixpath.dirname(label_file.path)
        root = posixpath.commonpath([root, base]) if root and base else ""
        limit = _LABEL_FILE_BYTES + _LABEL_BYTES * len(images)
        if label_file.size > limit:
            raise UserError(
                f"{place}: {label_file.path} has {label_file.size:,} bytes, too many for the labels of {len(images):,} images "
                f"(at most {limit:,}); write it again, or leave it out and put each class into a folder"
            )
        labels, classes = _labels_from_json(images, label_file.path, read(label_file.path), problems)
    else:
        labels, classes = _labels_from_folders(images, folders, root, problems)
    entries = _entries(images, labels, root, problems)
    problems.raise_if_any()
    return Listing(entries=entries, classes=classes, notes=notes)


def folders_of(names: Iterable[str], *, place: str) -> set[str]:
    """All folders that occur in the names of files, including their parent folders.

    Raises:
        UserError: a name is longer or has more folders than file systems allow; without this limit, a hostile archive
            could exhaust the memory, since every folder is held with its whole path.
    """
    folders: set[str] = set()
    for name in names:
        if len(name) > _LONGEST_PATH or name.count("/") > _DEEPEST_PATH:
            raise UserError(
                f"{place}: the file name {name[:80]!r}... has {len(name):,} signs and {name.count('/'):,} folders; at most "
                f"{_LONGEST_PATH:,} and {_DEEPEST_PATH} are read: rename it"
            )
        folder = name.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return folders


def _is_ignored(path: str) -> bool:
    return any((part.startswith(".") and part != "..") or part in _IGNORED for part in path.split("/"))


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1][1:].lower()


def _notes(others: Counter[str], left_out: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """One sentence that counts the skipped files by reason; empty if there are none."""
    reasons = []
    if others:
        shown = others.most_common(_KINDS_SHOWN)
        kinds = [f"{count:,} {f'.{kind}' if kind else 'without an ending'}" for kind, count in shown]
        rest = others.total() - sum(count for _, count in shown)
        kinds += [f"{rest:,} with other endings"] if rest else []
        reasons.append(f"not an image type that is read: {', '.join(kinds)}")
    reasons += [f"{reason}: {len(paths):,} ({paths[0]!r})" for reason, paths in left_out.items() if paths]
    if not reasons:
        return ()
    total = others.total() + sum(len(paths) for paths in left_out.values())
    return (f"passed over {total:,} files: {'; '.join(reasons)}",)


def _common_root(images: Sequence[str], folders: Sequence[str]) -> str:
    """The deepest folder that contains all images and has no sibling folders on the way from the root."""
    root = ""
    while True:
        start = len(root) + 1 if root else 0
        inside = [path[start:] for path in images]
        if any("/" not in path for path in inside):
            return root
        heads = {path.split("/", 1)[0] for path in inside}
        heads |= {f[start:].split("/", 1)[0] for f in folders if f.startswith(root) and f[start:]}
        if len(heads) != 1 or heads == {""}:  # the part before the first `/` of an absolute name is empty
            return root
        root = posixpath.join(root, heads.pop())


def _inside(path: str, root: str) -> str:
    return path[len(root) + 1 :] if root else path


def _labels_from_folders(
    images: Sequence[File], folders: Iterable[str], root: str, problems: Problems
) -> tuple[list[int | None], tuple[str, ...] | None]:
    paths = [_inside(image.path, root) for image in images]
    loose = [path for path in paths if "/" not in path]
    names = sorted({path.split("/", 1)[0] for path in paths if "/" in path})
    below = {_inside(f, root).split("/", 1)[0] for f in folders if f.startswith(f"{root}/" if root else "")}
    for empty in sorted(below - set(names) - {""}):
        if not _is_ignored(empty):
            problems.add(f"the folder {empty!r} holds no image; remove it, or put the images of the class there")
    if names and loose:
        problems.add(
            f"{len(loose):,} images lie beside the class folders ({loose[0]!r}, for one) and would have no label; "
            f"move them into a class folder, or give only the folder with the classes"
        )
    if names and set(map(str.lower, names)) <= _SPLITS:
        problems.add(
            f"the folders {', '.join(map(repr, names))} look like parts of a data set and not like classes; "
            f"pack each of them by itself"
        )
    if not names or loose:
        return [None] * len(images), None
    number = {name: place for place, name in enumerate(names)}
    return [number[path.split("/", 1)[0]] for path in paths], tuple(names)


def _labels_from_json(
    images: Sequence[File], label_file: str, data: bytes, problems: Problems
) -> tuple[list[int | None], tuple[str, ...] | None]:
    none: list[int | None] = [None] * len(images)
    stated, mistake = parse_label_file(data)
    if mistake:
        problems.add(f"{label_file}: {mistake}")
    if stated is None:
        return none, None
    base = posixpath.dirname(label_file)
    by_path = {posixpath.join(base, name): label for name, label in stated.items()}
    paths = {image.path for image in images}
    absent = sorted(by_path.keys() - paths)
    unlabelled = sorted(paths - by_path.keys())
    if absent:
        problems.add(f"{label_file} names {len(absent):,} images that are not there ({absent[0]!r}, for one)")
    if unlabelled:
        problems.add(
            f"{label_file} has no label for {len(unlabelled):,} of {len(images):,} images ({unlabelled[0]!r}, for "
            f'one); complete it, or write {{"labels": null}} for images without labels'
        )
    if absent or unlabelled:
        return none, None
    labels: list[int | None] = [by_path[image.path] for image in images]
    return labels, numbered_classes(list(by_path.values()))


def _entries(images: Sequence[File], labels: Sequence[int | None], root: str, problems: Problems) -> tuple[Entry, ...]:
    by_key: dict[str, Entry] = {}
    for image, label in zip(images, labels, strict=True):
        mistake = _bad_name(image.path, root)
        if mistake:
            problems.add(mistake)
            continue
        key = _key(_inside(image.path, root))
        entry = Entry(key=key, label=label, member=image.path, size=image.size)
        other = by_key.setdefault(key, entry)
        if other is not entry:
            problems.add(
                f"{other.member!r} and {image.path!r} would both have the key {key!r} (extensions are dropped and "
                f"dots become '_', since webdataset splits names at the first dot); rename one of them"
            )
    return tuple(by_key[key] for key in sorted(by_key))


def _key(path: str) -> str:
    folder, name = posixpath.split(path)
    return posixpath.join(folder, posixpath.splitext(name)[0].replace(".", "_"))


def _bad_name(path: str, root: str) -> str | None:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return f"the file name {path!r} is not UTF-8; rename it"
    if path.startswith("/") or ".." in path.split("/") or "\0" in path:
        return f"the file name {path!r} leaves the folder; rename it"
    if _SKIPPED_BY_WEBDATASET.match(_inside(path, root)):
        return f"webdataset passes over names like {path!r}, which begin with '__...__'; rename the folder"
    return None
