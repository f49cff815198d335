"""Runtime: rank, device, precision and process groups. Of GANs it knows only that there are two players."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from dist_gan.config import AdamSection, RuntimeSection, SGDSection
from dist_gan.runtime.player import Player
from dist_gan.types import Network, Networks, TrainingFailed, UserError

_PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16", "fp64": "fp64"}


class Runtime:
    """One process of a training run.

    Three process groups: training (gradients and buffers; NCCL on GPUs, gloo on CPUs), control (gloo: flags, small
    gathers, never in the way of a kernel), writer (gloo: for the checkpoint alone).
    """

    def __init__(self, section: RuntimeSection) -> None:
        self.section = section
        self.precision = resolve_precision(section)
        self._set_threads()
        self._accelerator = Accelerator(
            # Launchers say "CPU" in the launch file only; without this accelerate starts N lone processes on a CPU.
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=section.start_timeout_s)),
            ],
        )
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        assert self.world_size == launched, f"{launched} processes were launched, {self.world_size} found each other"
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        timeout = timedelta(seconds=section.start_timeout_s)
        self._control = self._writer = None
        if self.world_size > 1:
            self._control = dist.new_group(backend="gloo", timeout=timeout)
            self._writer = dist.new_group(backend="gloo", timeout=timeout)
        if section.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes logs."""
        return self.rank == 0

    def _set_threads(self) -> None:
        """Cores over the processes of this machine: launchers set one thread where nobody says otherwise."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(self.section.threads or max(1, cores // local))

    def describe(self) -> dict[str, Any]:
        """What the run is started on, for its first event."""
        return {
            "world_size": self.world_size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "strategy": "ddp" if self.world_size > 1 else "single",
        }

    # -- the two players ------------------------------------------------------------------------------------------

    def players(
        self, networks: Networks, *, g_optim: AdamSection | SGDSection, d_optim: AdamSection | SGDSection
    ) -> tuple[Player, Player]:
        """Generator and discriminator, moved to the device, wrapped, each with its optimizer."""
        players = []
        for name, module, section in (
            ("generator", networks.generator, g_optim),
            ("discriminator", networks.discriminator, d_optim),
        ):
            module = module.to(device=self.device, dtype=self.dtype)
            with warnings.catch_warnings():
                # torch 2.13 renames broadcast_buffers; accelerate knows the old name only, and torch 2.11 too.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
                wrapped = self._accelerator.prepare_model(module)
            players.append(Player(name, module, wrapped, section=section))
        return players[0], players[1]

    @contextmanager
    def turn(self, active: Player, resting: Player, *, last_micro: bool) -> Iterator[tuple[Network, Network]]:
        """Encloses the forward passes of a turn; yields what to call for generator and discriminator.

        The resting player is frozen and called past its wrapper, so nothing of it is ever reduced. Call backward
        after the block: its kernels take their precision from the forward pass.
        """
        active.module.requires_grad_(True)
        resting.module.requires_grad_(False)
        with nullcontext() if last_micro else active.without_reduction(), self._autocast():
            if active.name == "generator":
                yield active.wrapped, resting.module
            else:
                yield resting.module, active.wrapped

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def average_buffers(self, *players: Player) -> None:
        """Means of the floating buffers over all ranks, in one reduction, so that replicas stay bitwise equal."""
        if self.world_size == 1:
            return
        buffers = [b for player in players for b in player.module.buffers() if b.is_floating_point()]
        if buffers:
            flat = torch.cat([b.reshape(-1) for b in buffers])
            dist.all_reduce(flat)
            flat.div_(self.world_size)
            pieces = flat.split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(pieces, buffers, strict=True)])

    # -- slots of the global batch --------------------------------------------------------------------------------

    def slots(self, batch: int) -> Tensor:
        """This rank's places in the global batch: every world_size-th, so that a rank keeps its lanes."""
        assert batch % self.world_size == 0
        return torch.arange(self.rank, batch, self.world_size)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks in slot order; every rank gives equally many."""
        if self.world_size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    # -- small agreements -----------------------------------------------------------------------------------------

    def reduce_mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values.div_(self.world_size)
        return values

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place, of a tensor on the CPU."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self._control)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        if self.world_size == 1:
            return flag
        vote = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._control)
        return bool(vote.item())

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.any_rank(False)

    def share_json(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank. Nothing is pickled."""
        return self.gather_json(value if self.is_main else None)[0]

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in rank order, on every rank. Nothing is pickled."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._control)
        sizes = [int(n.item()) for n in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._control)
        return [json.loads(bytes(part[:n].numpy())) for part, n in zip(parts, sizes, strict=True)]

    def agree(self, problem: str | None) -> None:
        """Raises on every rank what went wrong on any, in the words of the lowest rank that has some."""
        problems = self.gather_json(problem)
        for rank, text in enumerate(problems):
            if text is not None:
                raise TrainingFailed(text if self.world_size == 1 else f"rank {rank}: {text}")

    def check_replicas(self, tensors: Mapping[str, Tensor]) -> None:
        """Compares a hash of all tensors over the ranks.

        Raises:
            TrainingFailed: they differ; names the first tensor that does, and the ranks.
        """
        if self.world_size == 1:
            return
        hashes = {name: tensor_hash(tensor) for name, tensor in sorted(tensors.items())}
        total = hashlib.sha256("".join(f"{n}{h}" for n, h in hashes.items()).encode()).hexdigest()
        if len(set(self.gather_json(total))) == 1:
            return
        everywhere = self.gather_json(hashes)
        for name in hashes:
            values = [h.get(name) for h in everywhere]
            if len(set(values)) > 1:
                odd = [r for r, v in enumerate(values) if v != values[0]]
                raise TrainingFailed(
                    f"the replicas differ: tensor {name} on rank {', '.join(map(str, odd))} is not that of rank 0; "
                    f"suspect a faulty device or a network that draws random numbers at its own"
                )
        raise TrainingFailed("the replicas differ in the names of their tensors")

    # -- time -----------------------------------------------------------------------------------------------------

    def shorten_timeout(self) -> None:
        """After the first step a rank that is missing has failed: waits become short."""
        if self.world_size > 1:
            timeout = timedelta(seconds=self.section.step_timeout_s)
            for group in (dist.group.WORLD, self._control):
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def peak_memory_bytes(self) -> int:
        """Largest memory of this process so far: the device's on a GPU, the resident set on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Leaves the process groups."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(cast(Any, data.numpy())).hexdigest()


def resolve_precision(section: RuntimeSection) -> str:
    """fp32, bf16 or fp64: the recipe's word, or the launch file's where the recipe says `auto`.

    Raises:
        UserError: the two contradict one another, or the launch file asks for what is not offered.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in _PRECISIONS:
        raise UserError(
            f"mixed_precision: {launched!r} of the launch file is not offered; choose no or bf16 "
            f"(fp16 overflows in gradient penalties)"
        )
    if section.precision == "auto":
        return _PRECISIONS[launched]
    if launched == "bf16" and section.precision != "bf16":
        raise UserError(
            f"runtime.precision: {section.precision!r} contradicts mixed_precision 'bf16' of the launch file; "
            f"set one of them, or runtime.precision=auto"
        )
    return section.precision
