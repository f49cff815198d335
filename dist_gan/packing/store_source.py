"""Images in an object store: one listing gives names, sizes and labels; each image is downloaded when it is packed."""

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
"""Number of first bytes of an image that are read for its size and channels. They nearly always hold the header;
otherwise the whole image is read."""


class StoreSource:
    """Image files below a URL, with a folder for each class, or without classes.

    Folders are derived from the names of files; empty objects that some stores keep for folders are ignored.

    Raises:
        UserError: there are no images, the folders contain mistakes, access is refused, or the store has no listing.
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
    """Reads the images of a `StoreSource`, in any process and thread.

    Args:
        url: URL of the folder of images.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._folder: StoreFolder | None = None

    def open(self, entry: Entry) -> BinaryIO:
        """The whole image file, in memory.

        Raises:
            UserError: access is refused.
            TrainingFailed: the store does not answer, or the file has been changed or removed.
        """
        return io.BytesIO(self.read(entry.member, entry.size))

    def open_head(self, entry: Entry) -> BinaryIO:
        """The first `HEAD_BYTES` of the image file, in memory. Raises the same exceptions as `open`."""
        return io.BytesIO(self.read(entry.member, entry.size, HEAD_BYTES))

    def read(self, name: str, size: int, limit: int | None = None) -> bytes:
        """Bytes of a file of the folder, at most `limit` of them. Raises the same exceptions as `open`."""
        try:
            return self._connected().read(name, size=size, limit=limit)
        except FileNotFoundError as error:
            # TrainingFailed and not BadImage: --skip-bad must not leave out an image because the source was changed.
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
    """Number of simultaneous requests for the images of a reader: several for a store, one for local files."""
    return fetching.MAX_REQUESTS if isinstance(reader, StoreReader) else 1
