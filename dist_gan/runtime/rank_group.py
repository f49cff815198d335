"""Sums and decisions of all ranks over one process group.

Every collective of the library goes through `RankGroup`, except for the collectives of DDP, of DeepSpeed and of batch
normalisation over all ranks: these are part of a forward or backward pass, and use torch's process group directly.
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
        heartbeat: heartbeat that counts votes and exchanges as landmarks (named points of training); None for a group
            that another thread than the training thread uses, since all ranks pass the landmarks in the same order.
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
        """Sums a tensor on the group's device (CPU or training device) over the ranks, in place; returns the tensor."""
        if self._world_size > 1:
            dist.all_reduce(values, group=self.process_group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Averages a tensor on the group's device (CPU or training device) over the ranks, in place; returns the tensor."""
        if self._world_size > 1:
            self.sum(values).div_(self._world_size)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Gathers the rows of all ranks; row i of rank r becomes row `i * world_size + r` of the result.

        This is the order of the slots (positions of samples in the global batch), which the ranks take in rotation.

        Args:
            rows: tensor of any shape, with the same number of rows on every rank, on the group's device.
        """
        if self._world_size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self._world_size)]
        dist.all_gather(parts, rows.contiguous(), group=self.process_group)
        return torch.stack(parts, dim=1).flatten(0, 1)

    # -- decisions ------------------------------------------------------------------------------------------------

    def any_rank(self, flag: bool) -> bool:
        """Returns True on every rank if `flag` is True on any rank."""
        self._mark("a vote of all ranks")
        if self._world_size == 1:
            return flag
        vote = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.process_group)
        return bool(vote.item())

    def barrier(self) -> None:
        """Waits until all ranks have called this method."""
        self.any_rank(False)

    def share_json(self, value: Any, *, error: UserError | TrainingFailed | None = None) -> Any:
        """Sends rank 0's JSON value to all ranks; returns it on every rank.

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
        """Returns the JSON values of all ranks, in rank order, on every rank."""
        if self._world_size == 1:
            return [value]
        self._mark("an agreement of all ranks")
        data = json.dumps(value).encode()
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.process_group)
        # JSON may end in spaces. A gather and a broadcast along a tree are faster than an all-gather in world_size rounds.
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
        """Raises TrainingFailed on every rank if any rank has a problem: the problem of the lowest such rank."""
        raise_first(self.gather_json(problem))

    def compare_replicas(self, fingerprints: Fingerprints) -> None:
        """Compares the fingerprints (checksums) that each rank has computed of the tensors of its own replica.

        Raises:
            TrainingFailed: a tensor is not the same on every rank; the error names the first such tensor, and the ranks.
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
        """Sends rank 0's bytes to all ranks; returns them on every rank."""
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
        problems: problem of each rank, in rank order. In a list of one rank, the problem is reported without the rank.
    """
    for rank, text in enumerate(problems):
        if text is not None:
            raise TrainingFailed(*(text if len(problems) == 1 else f"rank {rank}: {text}").split("\n"))


def _to_json(error: UserError | TrainingFailed | None) -> list[Any] | None:
    """Returns an error as a list: True for a UserError or False for a TrainingFailed, then the lines; None for None."""
    return None if error is None else [isinstance(error, UserError), *map(str, error.args)]


def _raise_first_error(sent: Sequence[list[Any] | None]) -> None:
    """Raises the first error in a list of results of `_to_json`; returns if all results are None."""
    for entry in sent:
        if entry is not None:
            is_mistake, *lines = entry
            raise UserError(*lines) if is_mistake else TrainingFailed(*lines)


def _as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
