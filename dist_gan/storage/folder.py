"""A folder in an object store, for code that reads or writes many files of it with one time limit."""

from __future__ import annotations

from pathlib import Path

from dist_gan.storage import reading, writing
from dist_gan.storage.patience import Patience
from dist_gan.storage.reading import FoundFile as FoundFile
from dist_gan.types import TrainingFailed
from dist_gan.urls import join, local_path

_TRIES = 3


class StoreFolder:
    """A folder in a store that is not this machine's disk, for any number of threads.

    Names of its files may hold characters that a URL may not, such as `?`. All requests share one `Patience`. A request
    that fails for good raises one sentence: TrainingFailed if the store does not answer, UserError if it refuses access.

    Args:
        url: URL of the folder; the folder need not exist.
    """

    def __init__(self, url: str) -> None:
        assert local_path(url) is None
        self.url = url
        self._patience = Patience()

    def files(self) -> list[FoundFile]:
        """All files at any depth, sorted; an absent folder is empty."""
        return reading.list_files(self.url, patience=self._patience)

    def names(self) -> dict[str, int | None]:
        """Direct entries of the folder: size of a file in bytes, None for a folder; an absent folder is empty."""
        return reading.entries(self.url, patience=self._patience)

    def read(self, name: str, *, size: int, limit: int | None = None) -> bytes:
        """All bytes of a file whose size a listing gave, or the first `limit`, by one request.

        Raises:
            FileNotFoundError: the file is absent.
            TrainingFailed: the store does not answer, or the file has another size by now.
            UserError: access is refused.
        """
        wanted = size if limit is None else min(size, limit)
        if not wanted:
            return b""
        # One byte more than there should be shows that the file has grown.
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
        """Removes a file; an absent file is no error."""
        writing.remove_in(self.url, name, patience=self._patience)
