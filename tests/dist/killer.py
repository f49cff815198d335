"""train.py that is killed at one moment of saving, rolling back or resuming: killer.py OUT POINT[:NAN_FROM] CONFIG [key=value ...].

The process that comes to the POINT first kills itself, and with KILL_ALL=1 its siblings before. It fires once: a file in
OUT says so, and with it there the run goes undisturbed. NAN_FROM is a draw from which on images are not numbers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_gan import resume, storage
from dist_gan.process import life
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config.reader import load_config
from dist_gan.data.stream import ImageStream
from dist_gan.saving import Saving
from dist_gan.types import Batch

OUT, (POINT, _, NAN_FROM) = Path(sys.argv[1]), sys.argv[2].partition(":")
SECOND = 2
"""Everything happens at the second checkpoint, so that there is one to go back to; retention at the third."""


def die() -> None:
    fired = OUT / "fired"
    if fired.exists():
        return
    fired.write_text(POINT)
    if os.environ.get("KILL_ALL"):
        children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
        for child in map(int, children):
            if child != os.getpid() and b"killer.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Kills when a function is about to be called, and `when` says so."""
    honest = getattr(owner, name)

    def called(*arguments: Any, **more: Any) -> Any:
        if when(*arguments, **more):
            die()
        return honest(*arguments, **more)

    setattr(owner, name, called)


def serial(url: str) -> int:
    return int(Path(url).parent.name.split("-")[1]) if "checkpoint-" in url else 0


def publishing(name: str) -> Callable[..., bool]:
    return lambda url, data: url.endswith(name) and serial(url) == SECOND


def install() -> None:
    if POINT == "before-staging":
        saves: list[int] = []
        before(Checkpointer, "save", lambda *a, **k: saves.append(1) or len(saves) == SECOND)
    elif POINT == "first-save":
        before(Checkpointer, "save", lambda *a, **k: True)
    elif POINT == "mid-file":
        honest = storage.local.publish

        def half(path: Path, data: bytes | memoryview) -> None:
            if path.name.endswith(".safetensors") and serial(str(path)) == SECOND:
                with open(path.with_name(f".{path.name}.tmp"), "wb") as file:
                    file.write(bytes(data)[: len(data) // 2])
                    file.flush()
                    die()
            honest(path, data)

        storage.local.publish = half
    elif POINT == "after-files":
        before(storage, "publish", publishing("manifest.json"))
    elif POINT == "before-commit":
        before(storage, "publish", publishing("COMMIT"))
    elif POINT == "after-commit":
        before(Checkpointer, "_retire", lambda self, url: serial(url + "/x") == SECOND)
    elif POINT == "in-retention":
        before(storage, "remove_folder", lambda url: "checkpoint-" in url)
    elif POINT == "in-resume":
        before(Checkpointer, "load", lambda *a, **k: True)
    elif POINT == "rollback-after-intent":
        before(Checkpointer, "abandon_after", lambda *a: True)
    elif POINT == "rollback-before-load":
        before(resume, "_go_back", lambda *a: False)
        before(Checkpointer, "load", lambda *a, **k: True)
    elif POINT == "rollback-before-commit":
        before(Saving, "commit_rollback", lambda *a: True)
    elif POINT == "rollback-before-end":
        before(Checkpointer, "end_rollback", lambda *a: True)
    else:
        assert POINT == "never", POINT
    if NAN_FROM:
        honest_next = ImageStream.next

        def poisoned(stream: ImageStream) -> Batch:
            batch = honest_next(stream)
            if batch.draw >= int(NAN_FROM):
                batch.images[0, 0, 0, 0] = float("nan")
            return batch

        ImageStream.next = poisoned  # type: ignore[method-assign]


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    install()
    config = load_config(sys.argv[3], sys.argv[4:], world_size=int(os.environ.get("WORLD_SIZE", "1")))
    sys.exit(life.run(config))
