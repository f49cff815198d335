"""Sums and decisions of all ranks over one process group.

Every collective that the library calls itself goes through `RankGroup`. Those of DDP, of DeepSpeed and of the batch
normalisation over all ranks are part of a forward or backward pass, and go straight to the training group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_gan.runtime.fingerprint import Fingerprints
from dist_gan.runtime.heartbeat import Heartbeat
from dist_gan.types import TrainingFailed, UserError


class RankGroup:
    """All ranks of a launch, connected by one process group.

    Every method is collective: all ranks call the same methods in the same order, from one thread of each process.
    JSON is sent as text, so nothing is pickled. In a launch of one process no method communicates.

    Args:
        process_group: torch's process group of all ranks; None in a launch of one process.
        rank: rank of this process.
        world_size: number of processes of the launch.
        heartbeat: heartbeat in which votes and exchanges are marked as landmarks; None for a group that is not used by
            the training thread, since all ranks have to pass the landmarks in the same order.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        *,
        rank: int,
        world_size: int,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.process_group = process_group
        self._rank = rank
        self._world_size = world_size
        self._heartbeat = heartbeat

    # -- tensors --------------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place. The tensor is on the group's device: the CPU, or the training device."""
        if self._world_size > 1:
            dist.all_reduce(values, group=self.process_group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks, in place. The tensor is on the group's device: the CPU, or the training device."""
        if self._world_size > 1:
            self.sum(values).div_(self._world_size)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all ranks in slot order: row i of rank r is row `i * world_size + r` of the result.

        Args:
            rows: equally many rows on every rank, on the group's device.
        """
        if self._world_size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self._world_size)]
        dist.all_gather(parts, rows.contiguous(), group=self.process_group)
        return torch.stack(parts, dim=1).flatten(0, 1)

    # -- decisions ------------------------------------------------------------------------------------------------

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if `flag` is set on any rank."""
        self._mark("a vote of all ranks")
        if self._world_size == 1:
            return flag
        vote = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.process_group)
        return bool(vote.item())

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.any_rank(False)

    def share_json(self, value: Any, *, error: UserError | TrainingFailed | None = None) -> Any:
        """Rank 0's JSON value on every rank.

        Args:
            value: JSON value of rank 0; ignored on the other ranks.
            error: error that rank 0 has found instead of a value.

        Raises:
            UserError, TrainingFailed: rank 0's error, on every rank.
        """
        if self._world_size == 1:
            if error is not None:
                raise error
            return value
        self._mark("word from rank 0")
        message = json.dumps([value, _to_json(error)]).encode() if self._rank == 0 else b""
        value, sent = json.loads(self._broadcast(message))
        _raise_first_error([sent])
        return value

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in rank order, on every rank."""
        if self._world_size == 1:
            return [value]
        self._mark("an agreement of all ranks")
        data = json.dumps(value).encode()
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.process_group)
        # JSON may end in spaces. To rank 0 and from there down a tree: all to all would be as many rounds as ranks.
        mine = _as_bytes(data.ljust(int(longest)))
        parts = [torch.empty_like(mine) for _ in range(self._world_size)] if self._rank == 0 else None
        dist.gather(mine, parts, dst=0, group=self.process_group)
        joined = b"[" + b",".join(bytes(part.numpy()) for part in parts) + b"]" if parts is not None else b""
        return list(json.loads(self._broadcast(joined)))

    def raise_together(self, error: UserError | TrainingFailed | None) -> None:
        """Raises on every rank the error of the lowest rank that has one; returns if no rank has one."""
        if self._world_size == 1:
            if error is not None:
                raise error
            return
        _raise_first_error(self.gather_json(_to_json(error)))

    def agree(self, problem: str | None) -> None:
        """Raises TrainingFailed on every rank if any rank has a problem: the lowest such rank, and its sentence."""
        raise_first(self.gather_json(problem))

    def compare_replicas(self, fingerprints: Fingerprints) -> None:
        """Compares the fingerprints that all ranks have taken of their own replicas.

        Raises:
            TrainingFailed: some tensor is not the same on every rank; names the first one, and the ranks.
        """
        if self._world_size == 1:
            return
        mine = fingerprints.result()
        total = hashlib.sha256(json.dumps(sorted(mine.items())).encode()).hexdigest()
        if len(set(self.gather_json(total))) == 1:
            return
        everywhere = self.gather_json(mine)
        for name in mine:
            values = [theirs.get(name) for theirs in everywhere]
            if len(set(values)) > 1:
                common = max(values, key=values.count)  # rank 0's value if several are equally frequent
                odd = [r for r, v in enumerate(values) if v != common]
                raise TrainingFailed(
                    f"the replicas differ: tensor {name} on rank {', '.join(map(str, odd))} is not that of the other "
                    f"ranks; suspect a faulty device, or a network that draws random numbers of its own; start again "
                    f"from the last checkpoint, without that machine"
                )
        raise TrainingFailed("the replicas differ in the names of their tensors")

    # -- transport ------------------------------------------------------------------------------------------------

    def _broadcast(self, data: bytes) -> bytes:
        """The bytes of rank 0 on every rank."""
        length = torch.tensor(len(data))
        dist.broadcast(length, src=0, group=self.process_group)
        held = _as_bytes(data) if self._rank == 0 else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(held, src=0, group=self.process_group)
        return bytes(held.numpy())

    def _mark(self, landmark: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.mark(landmark)


def raise_first(problems: Sequence[str | None]) -> None:
    """Raises TrainingFailed with the problem of the lowest rank that has one; returns if no rank has one.

    Args:
        problems: problem of each rank, in rank order. A lone problem is reported without the number of its rank.
    """
    for rank, text in enumerate(problems):
        if text is not None:
            raise TrainingFailed(*(text if len(problems) == 1 else f"rank {rank}: {text}").split("\n"))


def _to_json(error: UserError | TrainingFailed | None) -> list[Any] | None:
    """True for a UserError and False for a TrainingFailed, followed by the lines of the error."""
    return None if error is None else [isinstance(error, UserError), *map(str, error.args)]


def _raise_first_error(sent: Sequence[list[Any] | None]) -> None:
    """Raises the first error of a list of results of `_to_json`; returns if all are None."""
    for entry in sent:
        if entry is not None:
            is_mistake, *lines = entry
            raise UserError(*lines) if is_mistake else TrainingFailed(*lines)


def _as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
