"""Meets the other rank, and stops dead before the first sum where it is told to: first_reduction_worker.py [RANK].

No launcher stands around it: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the test.
"""

from __future__ import annotations

import os
import signal
import sys

from dist_gan.config import RuntimeSection
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.types import TrainingFailed


class Mute(Runtime):
    """A rank that is there and never answers."""

    def _reduce_once(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    mute = sys.argv[1:] == [os.environ["RANK"]]
    try:
        (Mute if mute else Runtime)(RuntimeSection(threads=1, start_timeout_s=10), LaunchSettings("ddp"))
    except TrainingFailed as error:
        print(error, flush=True)
        os._exit(3)
    print("summed", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
