"""Saves checkpoints on all ranks together, in the background, and loads them. A checkpoint is complete or absent.

The training thread only copies: each rank copies its share of the tensors into one buffer that is laid out as the file.
A thread on each rank then hashes and writes the file; rank 0 writes the manifest and COMMIT, and deletes old
checkpoints. These threads communicate over a process group of their own. At most one checkpoint is being written at a
time. `dist_gan.checkpoint.reader` describes the format.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_gan import storage
from dist_gan.checkpoint import reader, retention, schema
from dist_gan.checkpoint.reader import SearchResult
from dist_gan.checkpoint.restoring import refuse_other_settings, restore
from dist_gan.checkpoint.share import BackgroundHash, CommittedCheckpoint, WriteJob, deal
from dist_gan.checkpoint.tensorfile import FileBuffer
from dist_gan.config import CheckpointSection
from dist_gan.run_mirror import RunMirror
from dist_gan.runtime import Fingerprints, Runtime, raise_first
from dist_gan.types import HasTensors, HasValues, Part, Scalars, TrainingFailed, UserError
from dist_gan.wording import safe


class Checkpointer:
    """Saves checkpoints on all ranks together, and loads them.

    Args:
        folder: URL of the folder that holds the checkpoints of a run.
        runtime: this process and its process groups.
        section: settings for the retention of checkpoints.
        facts: JSON about the run that every manifest repeats, such as the configuration's hash.
        logs: local log files, flushed to the disk before a checkpoint is committed.
        mirror: copies of the run's files beside the checkpoints, and the mark of their owner, on rank 0 of a run with
            `checkpoint.url`; None elsewhere.
    """

    def __init__(
        self,
        folder: str,
        *,
        runtime: Runtime,
        section: CheckpointSection,
        facts: Mapping[str, Any],
        logs: Sequence[Path] = (),
        mirror: RunMirror | None = None,
    ) -> None:
        self.folder = folder
        self._runtime = runtime
        self._section = section
        self._facts = dict(facts)
        self._logs = tuple(logs)
        self._mirror = mirror
        self._serial: int | None = None
        self._buffer: FileBuffer | None = None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._written: list[CommittedCheckpoint] = []

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self, images: int, parts: Mapping[str, Part], *, scalars: Scalars | None = None) -> str:
        """Copies the present state of `parts`, starts writing it in the background, and returns the checkpoint's URL.

        Waits only until the previous checkpoint is written, and until the state is copied.

        Args:
            images: number of images seen.
            parts: parts of the run by name.
            scalars: latest logged scalars, which `checkpoint.keep_best` compares.

        Raises:
            TrainingFailed: on every rank, if the previous checkpoint could not be written.
        """
        began = time.perf_counter()
        self.drain()
        runtime = self._runtime
        url = self._next_url(images)
        with_tensors = {part: state for part, state in parts.items() if isinstance(state, HasTensors)}
        table = {f"{part}/{name}": f for part, state in with_tensors.items() for name, f in state.table().items()}
        mine = deal(table, runtime.world_size)[runtime.rank]
        share = {name: table[name] for name in mine}
        if self._buffer is None or self._buffer.table != share:
            self._buffer = FileBuffer(share, pinned=runtime.device.type == "cuda")
        fingerprints = Fingerprints(enabled=runtime.world_size > 1)
        given = 0
        for part, state in with_tensors.items():
            for name, tensor in state.tensors():
                whole = f"{part}/{name}"
                fingerprints.add(whole, tensor)
                given += 1
                if whole in share:
                    self._buffer.put(whole, tensor)
        if given != len(table):
            raise TrainingFailed(
                f"a checkpoint cannot be written: {given} tensors came, and {len(table)} were announced"
            )
        job = WriteJob(
            url=url,
            images=images,
            file=f"data-{runtime.rank:05d}-of-{runtime.world_size:05d}.safetensors",
            values=json.dumps(
                {part: state.values() if isinstance(state, HasValues) else {} for part, state in parts.items()}
            ),
            scalars=dict(scalars or {}),
            fingerprints=fingerprints,
            ready=runtime.now_on_device(),
            began=began,
            blocked_s=time.perf_counter() - began,
        )
        self._thread = threading.Thread(target=self._run, args=(job, self._buffer), name="checkpoint", daemon=True)
        self._thread.start()
        return url

    @property
    def is_writer(self) -> bool:
        """True if this is rank 0, which alone writes COMMIT and the files that mark checkpoints."""
        return self._runtime.is_main

    @property
    def order_of_sums(self) -> dict[str, Any]:
        """Manifest entries that determine the order in which gradients are summed over ranks."""
        return {
            "world_size": self._runtime.world_size,
            "strategy": self._runtime.launch_settings.strategy,
            "gradient_layout": self._facts.get("gradient_layout"),
        }

    @property
    def failed(self) -> bool:
        """True if this rank knows that the checkpoint being written has failed; `drain` raises the reason on all ranks."""
        return self._problem is not None

    def finished(self) -> list[CommittedCheckpoint]:
        """Returns the checkpoints that have been committed since the last call."""
        found, self._written = self._written, []
        return found

    def drain(self) -> None:
        """Waits until the checkpoint that is being written is committed.

        Raises:
            TrainingFailed: on every rank, if the checkpoint could not be written.
        """
        if self._thread is None:
            return
        self._runtime.mark("waiting for a checkpoint")
        self._thread.join(timeout=self._section.wait_s)
        if self._thread.is_alive():
            raise TrainingFailed(
                f"a checkpoint was still being written after {self._section.wait_s} s (checkpoint.wait_s); "
                f"is {storage.redact(self.folder)} reachable?"
            )
        self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    # -- the writing thread ---------------------------------------------------------------------------------------

    def _run(self, job: WriteJob, buffer: FileBuffer) -> None:
        try:
            self._write(job, buffer)
            self._written.append(
                CommittedCheckpoint(job.url, job.images, job.blocked_s, time.perf_counter() - job.began)
            )
            if self._runtime.is_main:
                self._clear_away(job.url)
        except BaseException as error:  # `drain` raises the error, on the training thread
            self._problem = error

    def _write(self, job: WriteJob, buffer: FileBuffer) -> None:
        runtime = self._runtime
        if job.ready is not None:
            job.ready.synchronize()
        runtime.writer_group.compare_replicas(job.fingerprints)
        raise_first([runtime.writer_group.share_json(self._mirror.owner_problem() if self._mirror else None)])
        data = buffer.bytes()
        digest = BackgroundHash(data)
        problem, written = None, {}
        try:
            storage.make_folder(job.url)
            storage.publish(storage.join(job.url, job.file), data)
            written = {"file": job.file, "bytes": len(data), "sha256": digest.result(), "tensors": buffer.places}
        except TrainingFailed as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot write {storage.redact(job.url)}: {storage.why(error)}"
        except Exception as error:  # all other ranks wait for this rank's message
            problem = f"cannot write {storage.redact(job.url)}: {type(error).__name__}"
        files = runtime.writer_group.gather_json({"problem": problem, "written": written})
        raise_first([f["problem"] for f in files])
        problem = None
        if runtime.is_main:
            try:
                self._commit(job, [f["written"] for f in files])
            except TrainingFailed as error:
                problem = str(error)
            except OSError as error:
                problem = f"cannot finish {storage.redact(job.url)}: {storage.why(error)}"
            except Exception as error:
                problem = f"cannot finish {storage.redact(job.url)}: {type(error).__name__}"
        raise_first([runtime.writer_group.share_json(problem)])

    def _check_owner(self) -> None:
        if self._mirror is not None:
            self._mirror.check_owner()

    def _commit(self, job: WriteJob, files: list[Any]) -> None:
        manifest = {
            "format": schema.FORMAT,
            "version": schema.VERSION,
            "serial": reader.serial_of(job.url),
            "images": job.images,
            "world_size": self._runtime.world_size,
            "strategy": self._runtime.launch_settings.strategy,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **self._facts,
            "scalars": job.scalars,
            "files": {f["file"]: {"bytes": f["bytes"], "sha256": f["sha256"]} for f in files},
            "tensors": {name: {"file": f["file"], **entry} for f in files for name, entry in f["tensors"].items()},
            "values": json.loads(job.values),
        }
        data = json.dumps(manifest, indent=1).encode()
        for log in self._logs:  # flushed here, so that training does not wait for the disk
            storage.sync_file(log)
        if self._mirror is not None:
            self._mirror.push()
        storage.publish(storage.join(job.url, "manifest.json"), data)
        self._check_owner()
        storage.publish(storage.join(job.url, reader.COMMIT), hashlib.sha256(data).hexdigest().encode())

    # -- retention ------------------------------------------------------------------------------------------------

    def _clear_away(self, newest: str) -> None:
        try:
            self._retire(newest)
        except Exception as error:  # an old checkpoint that stays is no reason to stop training
            print(safe(f"dist_gan: old checkpoints could not be cleared away ({type(error).__name__})"), flush=True)

    def _retire(self, newest: str) -> None:
        self._check_owner()
        retention.retire(self.folder, newest, self._section)

    # -- marks ----------------------------------------------------------------------------------------------------

    def mark_healthy(self, url: str) -> None:
        """Marks a checkpoint HEALTHY: training continued without skipped updates after it. Only rank 0 calls this."""
        self._check_owner()
        if storage.exists(storage.join(url, reader.COMMIT)):
            storage.publish(storage.join(url, reader.HEALTHY), b"")

    def intend_rollback(self, target: str, intent: Mapping[str, Any]) -> None:
        """Records, first of all steps of a rollback, that all checkpoints after `target` are abandoned. On rank 0."""
        self._check_owner()
        retention.intend_rollback(self.folder, target, intent)

    def abandon_after(self, target: str) -> None:
        """Marks every checkpoint newer than `target` as abandoned. Only rank 0 calls this."""
        self._check_owner()
        retention.abandon_after(self.folder, target)

    def intended_rollback(self) -> dict[str, Any] | None:
        """Returns, on every rank, the record of a rollback that a killed process left unfinished; None without one.

        Raises:
            UserError: the record is damaged.
        """
        value: dict[str, Any] | None = self._on_main(lambda: retention.intended_rollback(self.folder))
        return value

    def end_rollback(self) -> None:
        """Deletes the record of a rollback that has committed a checkpoint of its own. Only rank 0 calls this."""
        self._check_owner()
        retention.end_rollback(self.folder)

    # -- loading --------------------------------------------------------------------------------------------------

    def _next_url(self, images: int) -> str:
        if self._serial is None:
            self._serial = self._on_main(
                lambda: max((serial for serial, _ in reader.list_checkpoints(self.folder)), default=0)
            )
        self._serial += 1
        return storage.join(self.folder, f"checkpoint-{self._serial:04d}-{images:012d}")

    def _on_main(self, look: Callable[[], Any]) -> Any:
        """Calls `look` on rank 0; returns its JSON value, or raises its exception, on every rank."""
        value: Any = None
        error: UserError | TrainingFailed | None = None
        if self._runtime.is_main:
            try:
                value = look()
            except (UserError, TrainingFailed) as caught:
                error = caught
        return self._runtime.control_group.share_json(value, error=error)

    def newest(self, *, healthy: bool = False, before: int | None = None) -> SearchResult:
        """Finds the newest committed, undamaged checkpoint, the same on every rank. Arguments: as in `reader.newest`.

        Waits until the checkpoint being written is committed, so that the search finds that one too.

        Raises:
            UserError: there are committed checkpoints and all of them are damaged.
            TrainingFailed: the store does not answer, or the checkpoint being written failed.
        """
        self.drain()
        found = self._on_main(lambda: reader.newest(self.folder, healthy=healthy, before=before)._asdict())
        result = SearchResult(found["url"], tuple(found["damaged"]))
        if result.url is None and result.damaged and not healthy:
            raise UserError(
                f"run.dir: every checkpoint in {storage.redact(self.folder)} is damaged ({'; '.join(result.damaged)}); "
                f"restore one, or move the folder away to begin anew"
            )
        return result

    def load(self, url: str, parts: Mapping[str, Part], *, may_lack: Collection[str] = ()) -> dict[str, Any]:
        """Restores the given parts of a run from a checkpoint; returns the checkpoint's manifest.

        Args:
            url: URL of the checkpoint.
            parts: parts of the run by name.
            may_lack: parts that stay as they are if the checkpoint lacks them.

        Raises:
            UserError: on every rank, if the checkpoint is damaged, uncommitted, or of other settings or networks.
            TrainingFailed: on every rank, if the store does not answer.
        """
        problem: UserError | TrainingFailed | None = None
        manifest: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        try:
            manifest, tensors = reader.read(url)
        except (UserError, TrainingFailed) as error:
            problem = error
        self._runtime.control_group.raise_together(problem)
        refuse_other_settings(url, manifest, self._facts.get("config"))
        restore(url, manifest, tensors, parts, may_lack=may_lack)
        return manifest
