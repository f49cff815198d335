"""Folder in an object store, for code that reads or writes many files there under one time limit for retries."""

from __future__ import annotations

from pathlib import Path

from dist_gan.storage import reading, writing
from dist_gan.storage.patience import Patience
from dist_gan.storage.reading import FoundFile as FoundFile
from dist_gan.types import TrainingFailed
from dist_gan.urls import join, local_path

_TRIES = 3


class StoreFolder:
    """A folder in an object store, not on a local disk; any number of threads may use it.

    Names of files may contain characters that a URL may not, such as `?`. All requests share one `Patience` (time limit
    of retries). A request that still fails after its retries raises TrainingFailed if the store does not answer, and
    UserError if the store refuses access.

    Args:
        url: URL of the folder; the folder need not exist.
    """

    def __init__(self, url: str) -> None:
        assert local_path(url) is None
        self.url = url
        self._patience = Patience()

    def files(self) -> list[FoundFile]:
        """Returns all files of the folder at any depth, sorted by name; an absent folder counts as empty."""
        return reading.list_files(self.url, patience=self._patience)

    def names(self) -> dict[str, int | None]:
        """Returns the direct entries of the folder by name: size of a file in bytes, None for a folder.

        An absent folder counts as empty.
        """
        return reading.entries(self.url, patience=self._patience)

    def read(self, name: str, *, size: int, limit: int | None = None) -> bytes:
        """Returns the bytes of a file, or its first `limit` bytes, by one request.

        Args:
            name: path of the file inside the folder.
            size: size of the file in bytes, as a listing gave it.
            limit: largest number of bytes to read; None for the whole file.

        Raises:
            FileNotFoundError: the file is absent.
            TrainingFailed: the store does not answer, or the file has another size by now.
            UserError: access is refused.
        """
        wanted = size if limit is None else min(size, limit)
        if not wanted:
            return b""
        # A request for one byte more than the listed size shows whether the file has grown.
        end = wanted + 1 if wanted == size else wanted
        for _ in range(_TRIES):
            data = reading.read_in(self.url, name, 0, end, patience=self._patience)
            if len(data) == wanted:
                return data
        raise TrainingFailed(
            f"cannot read {join(self.url, name)}: {size:,} bytes were listed, and it has "
            f"{'more' if len(data) > wanted else f'{len(data):,}'} now; it was changed in the meantime"
        )

    def upload(self, file: Path, name: str) -> None:
        """Copies a local file into the folder. Raises TrainingFailed or UserError as `storage.upload` does."""
        writing.upload(file, self.url, name, patience=self._patience)

    def remove(self, name: str) -> None:
        """Removes a file of the folder; an absent file is no error."""
        writing.remove_in(self.url, name, patience=self._patience)
