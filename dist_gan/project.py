"""Files of a project folder: `train.py`, recipes, launch files, Slurm's batch script and the documentation.

In a checkout they lie in its root, beside this package. A wheel carries the same files in `dist_gan/templates`
(pyproject.toml copies them there when the wheel is built), so the repository holds each of them once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dist_gan.mistakes import TrainingFailed, UserError

NAMES = ("train.py", "configs", "launch", "slurm", "docs")
"""Files and folders that `lay_out` copies."""

_PACKAGE = Path(__file__).resolve().parent
_ORIGINALS = _PACKAGE / "templates" if (_PACKAGE / "templates").is_dir() else _PACKAGE.parent

EMBEDDED_RECIPE = _ORIGINALS / "configs" / "shapes.yaml"
"""Recipe that the program runs if the user names none."""


def lay_out(folder: Path) -> None:
    """Copies the files of a project folder into `folder`, which is made if it does not exist.

    Raises:
        UserError: the folder cannot be made, or one of the names is taken there; nothing has been written then.
        TrainingFailed: the disk refuses a file; what had been copied is removed.
    """
    missing = [name for name in NAMES if not (_ORIGINALS / name).exists()]
    if missing:
        raise UserError(
            f"{_PACKAGE}: this copy of the package came without {', '.join(missing)}; install dist-gan from a wheel or a "
            f"checkout"
        )
    taken = [name for name in NAMES if os.path.lexists(folder / name)]
    if taken:
        raise UserError(
            f"{folder}: holds {', '.join(taken)} already, and nothing is overwritten; give another folder, or move "
            f"{'them' if len(taken) > 1 else 'it'} away"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); give another folder") from error
    try:
        for name in NAMES:
            _copy(_ORIGINALS / name, folder / name)
    except OSError as error:
        for name in NAMES:
            _remove(folder / name)
        raise TrainingFailed(
            f"{folder}: cannot be written to ({error.strerror}); the files that had been copied are removed again"
        ) from error


def _copy(source: Path, target: Path) -> None:
    """Copies content without permissions, since the files of an installation may be read-only."""
    if source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            if not entry.name.startswith((".", "__pycache__")):
                _copy(entry, target / entry.name)
    else:
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
