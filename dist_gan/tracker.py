"""Logs of a run: TensorBoard, two JSONL files, PNG grids and a progress line, all by images seen. Rank 0 alone writes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dist_gan import pictures, records, storage, wording
from dist_gan.types import Scalars, TrainingFailed

# TensorBoard interprets the tags of a custom chart as regular expressions.
_LAYOUT = {
    "game": {
        "logits: real against fake": ["Multiline", ["^logits/real$", "^logits/fake$"]],
        "losses": ["Multiline", ["^loss/discriminator$", "^loss/generator$"]],
        "gradient norms": ["Multiline", ["^gradient_norm/discriminator$", "^gradient_norm/generator$"]],
    }
}


class Tracker:
    """Writes the logs of a run. On ranks other than 0 every method does nothing.

    Args:
        folder: folder of the run.
        enabled: True on rank 0.
        attempt: number of this start of the run; every line of the logs has it.
        total: number of images after which the run ends.
        resumed_at: images seen at the checkpoint that the run resumes from; log lines after it are set aside.
        config_yaml: settings, shown in TensorBoard as text.
    """

    def __init__(
        self, folder: Path, *, enabled: bool, attempt: int, total: int, resumed_at: int, config_yaml: str
    ) -> None:
        self.folder = folder
        self.enabled = enabled
        self._attempt = attempt
        self._total = total
        if not enabled:
            return
        self.tensorboard_folder = folder / "tensorboard"
        self._samples = folder / "samples"
        self._samples.mkdir(parents=True, exist_ok=True)
        self._rewinds = 0
        odd = _set_aside(folder / "metrics.jsonl", resumed_at=resumed_at, name=f"before-attempt-{attempt:04d}")
        self._metrics = records.open_log(folder / "metrics.jsonl")
        self._events = records.open_log(folder / "events.jsonl")
        self._writer = self._board(purge_step=resumed_at + 1 if attempt > 1 else None)
        text = "".join(f"{wording.safe(line)}\n" for line in config_yaml.splitlines())
        self._writer.add_text("config", f"```yaml\n{text}```", global_step=resumed_at)
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=resumed_at, unit="img", unit_scale=True, disable=not self._on_terminal, smoothing=0.1
        )
        if odd:
            self.say(f"metrics.jsonl: {odd} odd lines were set aside")

    def _board(self, *, purge_step: int | None) -> SummaryWriter:
        writer = SummaryWriter(str(self.tensorboard_folder), purge_step=purge_step, flush_secs=10)
        writer.add_custom_scalars(_LAYOUT)
        return writer

    def rewind(self, images: int) -> None:
        """Moves log lines later than `images` to another file, so that a rollback logs no point twice."""
        if not self.enabled:
            return
        self._rewinds += 1
        self._metrics.close()
        name = f"before-rollback-{self._attempt:04d}-{self._rewinds:02d}"
        _set_aside(self.folder / "metrics.jsonl", resumed_at=images, name=name)
        self._metrics = records.open_log(self.folder / "metrics.jsonl")
        self._writer.close()
        self._writer = self._board(purge_step=images + 1)
        self._bar.reset(total=self._total)
        self._bar.update(images)

    def scalars(self, images: int, values: Scalars, *, clock: Scalars) -> None:
        """Logs scalars: `values` have been reduced over the ranks, `clock` is the timing of this rank."""
        if not self.enabled:
            return
        everything = values | clock
        line = {"images": images, "attempt": self._attempt} | everything
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, value in everything.items():
            self._writer.add_scalar(name, value, global_step=images)

    def progress(self, images: int, values: Scalars, *, clock: Scalars) -> None:
        """Shows the progress of the run: as a bar on a terminal, elsewhere as one line per tick."""
        if not self.enabled:
            return
        left = max(0, self._total - images) / max(clock["time/images_per_second"], 1e-9)
        facts = (
            f"D {values.get('loss/discriminator', float('nan')):.3f} G {values.get('loss/generator', float('nan')):.3f} "
            f"wait {100 * clock['time/data_wait_share']:.1f}% mem {clock['time/peak_memory_gib']:.2f} GiB"
        )
        skipped = values.get("skipped/generator", 0.0) + values.get("skipped/discriminator", 0.0)
        if skipped:
            facts += f" skipped {skipped:.0f}"
        if self._on_terminal:
            self._bar.update(images - self._bar.n)
            self._bar.set_postfix_str(facts, refresh=True)
        else:
            speed = clock["time/images_per_second"]
            self.say(f"{images:>12,}/{self._total:,} images  {speed:8.1f} img/s  {facts}  left {_span(left)}")

    def say(self, *lines: str) -> None:
        """Prints a message on the terminal; its second and later lines are indented."""
        if self.enabled:
            tqdm.write(wording.lines(lines), file=sys.stderr)

    def event(self, event: str, *, images: int, **facts: Any) -> None:
        """Appends a line to events.jsonl."""
        if not self.enabled:
            return
        line = {"event": event, "images": images, "attempt": self._attempt, "unix_time": round(time.time(), 3)}
        self._events.write(json.dumps(line | wording.safe_values(facts)) + "\n")
        self._events.flush()

    def grid(self, name: str, images: int, samples_NHWC: NDArray[np.uint8]) -> Path | None:
        """Writes a grid of pictures as PNG and to TensorBoard, under the tag `samples/NAME`; returns the path of the
        PNG.
        """
        if not self.enabled:
            return None
        columns = int(np.ceil(np.sqrt(len(samples_NHWC))))
        picture = pictures.grid(samples_NHWC, columns=columns)
        path = self._samples / f"{name}-{images:012d}.png"
        pictures.write_png(str(path), picture)
        self._writer.add_image(f"samples/{name}", picture, global_step=images, dataformats="HWC")
        return path

    def flush(self) -> None:
        """Writes buffered TensorBoard data to the disk."""
        if self.enabled:
            self._writer.flush()

    def close(self) -> None:
        """Closes the log files and the progress bar."""
        if self.enabled:
            self._bar.close()
            self._writer.close()
            self._metrics.close()
            self._events.close()


@contextmanager
def profiled(folder: Path, *, enabled: bool) -> Iterator[Any]:
    """Yields a function to be called after each step; with `enabled`, torch's profiler traces steps 10 to 15 for
    TensorBoard.
    """
    if not enabled:
        yield lambda: None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=8, warmup=2, active=5, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
    ) as profiler:
        yield profiler.step


def _set_aside(path: Path, *, resumed_at: int, name: str) -> int:
    """Moves log lines later than the checkpoint to another file, so that no point is logged twice.

    Unusable lines are moved, too; the function returns their number.

    Raises:
        TrainingFailed: the files cannot be read or written.
    """
    aside, temporary = path.with_name(f"{path.stem}.{name}{path.suffix}"), path.with_suffix(".tmp")
    try:
        with open(path, "rb") as lines:
            places = [_images_of(line) for line in records.raw_lines(lines)]
        if all(images is not None and images <= resumed_at for images in places):
            return 0
        with open(path, "rb") as lines, open(temporary, "wb") as kept, open(aside, "ab") as moved:
            for images, line in zip(places, records.raw_lines(lines), strict=True):
                (moved if images is None or images > resumed_at else kept).write(line)
            for file in (kept, moved):  # before the rename: a power cut could leave an empty file
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        storage.sync_folder(path.parent)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise TrainingFailed(f"cannot set lines of {path} aside: {storage.why(error)}") from error
    return places.count(None)


def _images_of(line: bytes) -> int | None:
    """Returns the number of images seen in a line of metrics; None for an unusable line."""
    record = records.sound_line(line, place="metrics")
    images = None if record is None else record.values.get("images")
    return images if type(images) is int and images >= 0 else None


def _span(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
