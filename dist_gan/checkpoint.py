"""Writes checkpoints from all ranks together, whole or not at all; dist_gan.checkpoint_format says what they are."""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_gan import storage, tensorfile
from dist_gan.checkpoint_format import FORMAT, VERSION, Found, listed, newest, read
from dist_gan.runtime import Runtime
from dist_gan.types import Stateful, TensorFacts, TrainingFailed, UserError


class Checkpointer:
    """Saves and loads on all ranks together.

    Args:
        folder: URL of the folder that holds the checkpoints of a run.
        runtime: the ranks.
        keep: newest checkpoints that are kept.
        facts: JSON about the run that every manifest repeats, such as the configuration's hash.
    """

    def __init__(self, folder: str, *, runtime: Runtime, keep: int, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self._runtime = runtime
        self._keep = keep
        self._facts = dict(facts)

    def save(self, images: int, parts: Mapping[str, Stateful]) -> str:
        """Writes a checkpoint and returns its URL once it is committed.

        Raises:
            TrainingFailed: on every rank, if any could not write, or if the replicas differ.
        """
        runtime = self._runtime
        mine = self._my_share(parts)
        url = runtime.share_json(self._next_url(images) if runtime.is_main else None)
        problem = None
        written: dict[str, Any] = {}
        try:
            storage.make_folder(url)
            name = f"data-{runtime.rank:05d}-of-{runtime.world_size:05d}.safetensors"
            data = tensorfile.to_bytes(mine)
            storage.publish(storage.join(url, name), data)
            written = {
                "file": name,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "tensors": _table(data),
            }
        except TrainingFailed as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot write {storage.redact(url)}: {storage.why(error)}"
        runtime.agree(problem)
        files = runtime.gather_json(written)
        values = {part: state.values() for part, state in parts.items()}
        problem = None
        if runtime.is_main:
            try:
                self._commit(url, images, files, values)
                self._retire()
            except TrainingFailed as error:
                problem = str(error)
            except OSError as error:
                problem = f"cannot finish {storage.redact(url)}: {storage.why(error)}"
        runtime.agree(problem)
        return str(url)

    def _my_share(self, parts: Mapping[str, Stateful]) -> dict[str, Tensor]:
        """Copies on the host of the tensors that this rank writes, once all ranks are known to have the same.

        Raises:
            TrainingFailed: the replicas differ.
        """
        runtime = self._runtime
        table = {f"{part}/{name}": facts for part, state in parts.items() for name, facts in state.table().items()}
        mine = set(_dealt(table, runtime.world_size)[runtime.rank])
        kept: dict[str, Tensor] = {}
        with runtime.compared_replicas() as seen:
            for part, state in parts.items():
                for name, tensor in state.tensors():
                    seen(f"{part}/{name}", tensor)
                    if f"{part}/{name}" in mine:
                        kept[f"{part}/{name}"] = tensor.detach().to("cpu", copy=True)
        assert kept.keys() == mine, f"a part's table is not what it gives: {sorted(kept.keys() ^ mine)[:5]}"
        return kept

    def _next_url(self, images: int) -> str:
        serials = [serial for serial, _ in listed(self.folder)]
        return storage.join(self.folder, f"checkpoint-{max(serials, default=0) + 1:04d}-{images:012d}")

    def _commit(self, url: str, images: int, files: list[Any], values: Mapping[str, Any]) -> None:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "serial": int(url.rsplit("/", 1)[-1].split("-")[1]),
            "images": images,
            "world_size": self._runtime.world_size,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **self._facts,
            "files": {f["file"]: {"bytes": f["bytes"], "sha256": f["sha256"]} for f in files},
            "tensors": {name: {"file": f["file"], **entry} for f in files for name, entry in f["tensors"].items()},
            "values": values,
        }
        data = json.dumps(manifest, indent=1).encode()
        storage.publish(storage.join(url, "manifest.json"), data)
        storage.publish(storage.join(url, "COMMIT"), hashlib.sha256(data).hexdigest().encode())

    def _retire(self) -> None:
        """Deletes what is older than the newest `keep` committed ones, and what was never committed."""
        entries = [(storage.join(self.folder, name), name) for _, name in listed(self.folder)]
        committed = [url for url, _ in entries if storage.exists(storage.join(url, "COMMIT"))]
        kept = set(committed[-self._keep :])
        for url, _ in entries:
            if url not in kept and url != entries[-1][0]:
                storage.remove(storage.join(url, "COMMIT"))
                storage.remove_folder(url)

    def newest(self) -> Found:
        """The newest committed checkpoint that is undamaged, on every rank alike.

        Raises:
            UserError: there are committed checkpoints and all of them are damaged.
        """
        found = self._runtime.share_json(newest(self.folder)._asdict() if self._runtime.is_main else None)
        result = Found(found["url"], tuple(found["damaged"]))
        if result.url is None and result.damaged:
            raise UserError(
                f"run.dir: every checkpoint in {storage.redact(self.folder)} is damaged ({'; '.join(result.damaged)}); "
                f"restore one, or move the folder away to begin anew"
            )
        return result

    def load(self, url: str, parts: Mapping[str, Stateful]) -> dict[str, Any]:
        """Puts a checkpoint back into the parts; returns its manifest.

        Raises:
            UserError: it is damaged, not committed, or of other parts.
        """
        problem: str | None = None
        manifest: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        try:
            manifest, tensors = read(url)
        except UserError as error:
            problem = str(error)
        for text in self._runtime.gather_json(problem):
            if text is not None:
                raise UserError(text)
        unknown = manifest["values"].keys() ^ parts.keys()
        if unknown:
            raise UserError(f"{storage.redact(url)}: holds other parts than this version: {', '.join(sorted(unknown))}")
        for part, state in parts.items():
            prefix = f"{part}/"
            state.load_tensors({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            state.load_values(manifest["values"][part])
        return manifest


def _dealt(tensors: Mapping[str, TensorFacts], ranks: int) -> list[list[str]]:
    """Names for each rank: the largest first, always to the rank that has the fewest bytes."""
    hands: list[list[str]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = held.index(min(held))
        hands[rank].append(name)
        held[rank] += tensors[name].nbytes
    return hands


def _table(data: bytes) -> dict[str, Any]:
    """Shape, dtype and place in the file of each tensor, from the safetensors header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {
        name: {"shape": e["shape"], "dtype": e["dtype"], "offsets": [8 + length + o for o in e["data_offsets"]]}
        for name, e in header.items()
        if name != "__metadata__"
    }
