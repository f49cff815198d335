"""Images in an object store: one listing gives names, sizes and labels; bytes are fetched when they are packed."""

from __future__ import annotations

import hashlib
import io
from typing import Any, BinaryIO

from dist_gan import storage
from dist_gan.packing import fetching
from dist_gan.packing.image_source import ImageReader
from dist_gan.packing.listing import Entry, File, folders_of, list_images
from dist_gan.storage.folder import StoreFolder
from dist_gan.types import TrainingFailed, UserError

HEAD_BYTES = 2**16
"""So much of an image is fetched to see its size and channels; nearly always enough, else all of it is fetched."""


class StoreSource:
    """Image files below a URL, with a folder for each class or none.

    Folders are what the names of files show: objects that stand for empty folders say nothing.

    Raises:
        UserError: no images, mistakes in the tree, access is refused, or a store that cannot list.
        TrainingFailed: the store does not answer.
    """

    def __init__(self, url: str) -> None:
        storage.check_url(url, place="source")
        if storage.scheme_of(url) in ("http", "https"):
            raise UserError(f"{url}: an HTTP server has no listing of its files; give a bucket or a local folder")
        self.place = url
        reader = StoreReader(url)
        found = StoreFolder(url).files()
        if not found:
            raise UserError(f"{url}: nothing is there; give a folder of images, and check its name and the bucket's")
        sizes = {file.name: file.size for file in found}
        listing = list_images(
            [File(file.name, file.size) for file in found],
            sorted(folders_of(sizes, place=storage.redact(url))),
            place=url,
            read=lambda name: reader.read(name, sizes[name]),
        )
        self.entries, self.classes, self.notes = listing.entries, listing.classes, listing.notes
        versions = {file.name: file.version for file in found}
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(repr((entry.member, versions[entry.member])).encode())
        self.identity = digest.hexdigest()
        self.reader: ImageReader = reader


class StoreReader:
    """Gets at images in a store from any process and thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._folder: StoreFolder | None = None

    def open(self, entry: Entry) -> BinaryIO:
        """The image file, all of it. Raises: UserError, TrainingFailed: never because of what is in the file."""
        return io.BytesIO(self.read(entry.member, entry.size))

    def open_head(self, entry: Entry) -> BinaryIO:
        """The beginning of the image file. Raises: as `open`."""
        return io.BytesIO(self.read(entry.member, entry.size, HEAD_BYTES))

    def read(self, name: str, size: int, limit: int | None = None) -> bytes:
        """Bytes of a file of the folder. Raises: as `open`."""
        try:
            return self._connected().read(name, size=size, limit=limit)
        except FileNotFoundError as error:
            # No bad image, which could be left out: the source is not what was listed.
            raise TrainingFailed(
                f"{storage.join(self._url, name)}: was there when the pack began and is gone; let nobody change the "
                f"source, and start again"
            ) from error

    def _connected(self) -> StoreFolder:
        if self._folder is None:
            self._folder = StoreFolder(self._url)
        return self._folder

    def __getstate__(self) -> dict[str, Any]:
        return {"_url": self._url, "_folder": None}


def num_requests(reader: ImageReader) -> int:
    """How many images of a reader are worth asking for at the same time: a disk is asked for one."""
    return fetching.MAX_REQUESTS if isinstance(reader, StoreReader) else 1
