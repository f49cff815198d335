"""Command-line program that trains a GAN: `python -m dist_gan` does the same as `python train.py`.

    accelerate launch train.py                                    the embedded run: shapes that the program draws
    accelerate launch train.py configs/NAME.yaml [section.key=value ...]
    python train.py --dry-run [configs/NAME.yaml] [section.key=value ...]
    python train.py --help

Running the same command again resumes. --dry-run checks settings and data, and shows the resolved run. Exit code: 0
finished; 2 the configuration is wrong; 3 training failed and starting again would not help; 75 stopped on request after
saving a checkpoint; anything else is a crash. Launchers exit with 1 after any failure: read outcome.json.
DIST_GAN_TRACEBACK=1 prints tracebacks of unforeseen errors.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_gan.own_parts import OwnParts


def start(arguments: Sequence[str]) -> int:
    """Runs `main` as this process's program, after setting the environment and signal handlers that torch needs at
    import.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    # torch reads this variable once, when it is imported: waiting threads sleep instead of spinning. With spinning, one
    # other busy process (or our own decoder) made a step of small networks seven times slower; measured on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = main(arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from dist_gan.process.last_words import leave

        leave(code)
    return code


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ends the program with one sentence on a signal that arrives while modules are still being imported."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"dist_gan: stopped by SIGINT before the start; start the same command again\n")
    os._exit(130)


def main(arguments: Sequence[str], *, own: OwnParts | None = None) -> int:
    """Reads the command line, and trains or shows what would be trained; returns the exit code.

    Args:
        arguments: the command line without the program's name.
        own: parts of the user's own script; None without any.
    """
    from dist_gan.wording import last_resort, print_anything, report

    print_anything()
    try:
        return _main(arguments, own)
    except Exception as error:
        print(report(f"dist_gan: {last_resort(error)}"), file=sys.stderr, flush=True)
        return 1


def _main(arguments: Sequence[str], own: OwnParts | None) -> int:
    from dist_gan.config.reader import run_dir_of
    from dist_gan.mistakes import UserError
    from dist_gan.process.start import describe, place_in_launch, settings
    from dist_gan.project import EMBEDDED_RECIPE
    from dist_gan.wording import report, safe

    flags = [a for a in arguments if a.startswith("-")]
    files = [a for a in arguments if not a.startswith("-") and "=" not in a]
    overrides = [a for a in arguments if not a.startswith("-") and "=" in a]
    if "--help" in flags or "-h" in flags:
        print(help_text())
        return 0
    is_rehearsal = "--dry-run" in flags
    try:
        place = place_in_launch(os.environ)
    except UserError as error:  # the rank is unknown, so every rank reports the mistake
        print(report(f"dist_gan: {error}"), flush=True)
        return 2
    try:
        unknown = [f for f in flags if f != "--dry-run"]
        if unknown or len(files) > 1:
            raise UserError(
                f"{' '.join(unknown or files[1:])}: not understood; give one YAML file, settings as section.key=value, "
                f"--dry-run or --help"
            )
        config = settings(
            files[0] if files else EMBEDDED_RECIPE, overrides, place=place, is_rehearsal=is_rehearsal, own=own
        )
    except UserError as error:
        # The default folder was not named by the user, and a rehearsal writes nothing.
        named = None if is_rehearsal else run_dir_of(files[0] if files else None, overrides)
        from dist_gan.process.life import refuse_start

        return refuse_start(error, named)
    if is_rehearsal:
        for line in describe(config, world_size=place.world_size, own=own).splitlines():
            print(safe(line))
        return 0
    from dist_gan.own_parts import NO_PARTS
    from dist_gan.process.life import run

    return run(config, own=own or NO_PARTS)


def help_text() -> str:
    """Returns the text of `--help`: usage, and every setting with default and description."""
    from dist_gan.config.reader import schema_help

    return f"{__doc__}\nSettings, with their defaults:\n\n{schema_help()}"


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
