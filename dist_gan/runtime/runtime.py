"""Runtime: rank, device, precision and process groups. Of GANs it knows only that there are two players."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_gan.config import RuntimeSection
from dist_gan.runtime.accelerators import make_accelerators
from dist_gan.runtime.batchnorm import synchronise_batchnorm
from dist_gan.runtime.buckets import Bucketed, lay_out
from dist_gan.runtime.fingerprint import Comparison
from dist_gan.runtime.groups import FIRST_REDUCTION_S, first_reduction, join
from dist_gan.runtime.heartbeat import Heartbeat, Missing
from dist_gan.runtime.launched import Launch
from dist_gan.runtime.launcher import find_launcher
from dist_gan.runtime.meeting import Meeting, Word, open_meeting
from dist_gan.runtime.numerics import set_numerics
from dist_gan.runtime.player import OptimSection, Player, TorchPlayer, build_optimizer
from dist_gan.types import Network, Networks, TrainingFailed, UserError
from dist_gan.wording import safe

COLLECTIVES_LATER_S = 30


class Runtime:
    """One process of a training run.

    Three process groups: training (gradients and buffers; NCCL on GPUs, gloo on CPUs), control (gloo: flags, small
    gathers, never in the way of a kernel), writer (gloo: for the checkpoint alone).

    Args:
        section: settings of devices, precision and processes.
        launch: settings from the launcher's environment.
        meeting: the launch's store, after all ranks have joined; None to join here.
        on_lost: called with the missing ranks before this process ends because of them.
        on_over: called with another rank's verdict that the launch is over, before this process ends.
    """

    def __init__(
        self,
        section: RuntimeSection,
        launch: Launch,
        *,
        meeting: Meeting | None = None,
        on_lost: Callable[[Missing], object] | None = None,
        on_over: Callable[[Word], object] | None = None,
    ) -> None:
        self.section = section
        self.launch = launch
        self.precision = launch.precision
        self._set_threads()
        set_numerics(section)
        on_cpu = section.device == "cpu" or not torch.cuda.is_available()
        timeout = timedelta(seconds=section.start_timeout_s)
        meeting = meeting or open_meeting(os.environ, patience_s=section.start_timeout_s)
        self.meeting: Meeting | None = None
        """The launch's store, over the connection of the heartbeats; None for a lone process."""
        self._heartbeat: Heartbeat | None = None
        if meeting is not None:
            self.meeting = meeting.private()
            # Started before the groups, so that a rank that dies while they are being created is detected, too.
            self._heartbeat = Heartbeat(
                self.meeting,
                patience_s=section.start_timeout_s,
                launcher=find_launcher(os.environ),
                on_missing=on_lost or (lambda missing: print(safe(f"dist_gan: {missing.reason}"), flush=True)),
                on_over=on_over or (lambda word: None),
            )
            join(meeting, on_cpu=on_cpu, timeout=timeout)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        self._accelerators = make_accelerators(section, launch, on_cpu=on_cpu, timeout=timeout)
        accelerator = self._accelerators["generator"]
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        if self.world_size != launched:
            raise TrainingFailed(f"{launched} processes were launched, and {self.world_size} found each other")
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        self._control = self._writer = None
        self._engine_groups: list[dist.ProcessGroup] = []
        if self.world_size > 1:
            self._control = dist.new_group(backend="gloo", timeout=timeout)
            self._writer = dist.new_group(backend="gloo", timeout=timeout)
            self._reduce_once()

    def _reduce_once(self) -> None:
        cpu = torch.device("cpu")
        places = {
            "the processes" if self.device.type == "cpu" else "the GPUs": (dist.group.WORLD, self.device),
            "the control group": (self._control, cpu),
            "the checkpoints' group": (self._writer, cpu),
        }
        limit = min(FIRST_REDUCTION_S, self.section.start_timeout_s / 2)  # shorter than the heartbeat's time limit
        first_reduction(places, world_size=self.world_size, timeout_s=limit)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the logs."""
        return self.rank == 0

    def _set_threads(self) -> None:
        """Cores over the processes of this machine: launchers set one thread where nobody says otherwise."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self.section.threads or max(1, cores // local)
        torch.set_num_threads(threads)
        # Where no launcher has set it (torchrun with one process a machine), accelerate would set threads of its own.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))

    def describe(self) -> dict[str, Any]:
        """Device, precision, threads and strategy of the start, for the run's first event."""
        return {
            "world_size": self.world_size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "precision": self.precision + ("+tf32" if self.section.tf32 else ""),
            "threads": torch.get_num_threads(),
            "strategy": self.launch.strategy + ("+offload" if self.launch.offload else ""),
        }

    @property
    def in_words(self) -> str:
        """Number of processes, device, strategy and precision, for the line that a start begins with."""
        facts = self.describe()
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{processes} on {facts['device']}, {facts['strategy']}, {facts['precision']}"

    @staticmethod
    def packages() -> dict[str, str]:
        """Versions of what wraps the players."""
        return {"accelerate": accelerate.__version__}

    def seed(self, value: int) -> None:
        """Seeds torch's generators of the CPU and of this process' device, used by dropout and noise in networks.

        `torch.manual_seed` gives the same numbers, but visits every backend that torch knows, at 0.2 ms a call.
        """
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    # -- the two players ------------------------------------------------------------------------------------------

    def players(self, networks: Networks, *, g_optim: OptimSection, d_optim: OptimSection) -> tuple[Player, Player]:
        """Generator and discriminator, moved to the device, wrapped, each with its optimizer.

        In ZeRO stage 3 the networks' weights are partitioned in place: whatever needs them whole copies them before.
        """
        return (
            self._player("generator", networks.generator, g_optim),
            self._player("discriminator", networks.discriminator, d_optim),
        )

    def _player(self, name: str, module: nn.Module, section: OptimSection) -> Player:
        module = module.to(device=self.device, dtype=self.dtype)
        if self.section.sync_batchnorm:
            module = synchronise_batchnorm(module)
        optimizer = build_optimizer(list(module.parameters()), section)
        accelerator = self._accelerators[name]
        if self.launch.zero_stage is None:
            if self.world_size == 1:
                wrapped, prepared = accelerator.prepare(module, optimizer)
                return TorchPlayer(name, module, wrapped, prepared, clip=section.clip)
            with warnings.catch_warnings():
                # torch 2.13 renames broadcast_buffers; accelerate knows the old name only, and torch 2.11 too.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
                wrapped, prepared = accelerator.prepare(Bucketed(module), optimizer)
            layout = lay_out(wrapped)
            return TorchPlayer(name, module, wrapped, prepared, clip=section.clip, layout=layout)
        from dist_gan.runtime.zero import engine_player, engine_settings

        stage = self.launch.zero_stage
        settings = engine_settings(
            self.launch.zero_options,
            stage=stage,
            offload=self.launch.offload,
            clip=section.clip,
            elements=sum(p.numel() for p in module.parameters()),
        )
        accelerator.state.select_deepspeed_plugin(name)
        accelerator.deepspeed_plugin.deepspeed_config.update(settings)
        engine, _ = accelerator.prepare(module, optimizer)
        if self.world_size > 1:  # DeepSpeed's copy of the training group has its own timeout
            self._engine_groups = [engine.seq_data_parallel_group]
            self._set_timeout(self.section.start_timeout_s, self._engine_groups)
        return engine_player(name, engine, optimizer, stage=stage, clip=section.clip, settings=settings)

    @contextmanager
    def turn(self, active: Player, resting: Player, *, last_micro: bool) -> Iterator[tuple[Network, Network]]:
        """Encloses the forward passes of a turn; yields what to call for generator and discriminator.

        The resting player is frozen and called past its wrapper, so nothing of it is ever reduced. Call backward
        after the block: its kernels take their precision from the forward pass.
        """
        self.mark(f"the {active.name}'s turn")
        active.module.requires_grad_(True)
        resting.rest()
        with active.accumulate(last=last_micro), self._autocast():
            if active.name == "generator":
                yield active.callable, resting.module
            else:
                yield resting.module, active.callable

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
        if batch % self.world_size:
            raise UserError(f"run.batch: {batch} images do not divide over {self.world_size} processes")
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
        """True on every rank if `flag` is set on any. Collective."""
        self.mark("a vote of all ranks")
        if self.world_size == 1:
            return flag
        vote = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._control)
        return bool(vote.item())

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.any_rank(False)

    def share_json(self, value: Any, *, writer: bool = False) -> Any:
        """Rank 0's JSON value on every rank; `writer` as in `gather_json`. Nothing is pickled."""
        if self.world_size == 1:
            return value
        if not writer:
            self.mark("word from rank 0")
        data = json.dumps(value).encode() if self.is_main else b""
        return json.loads(self._from_rank_zero(data, self._writer if writer else self._control))

    def gather_json(self, value: Any, *, writer: bool = False) -> list[Any]:
        """The JSON values of all ranks, in rank order, on every rank. Nothing is pickled.

        Args:
            value: what JSON can hold.
            writer: over the group of the checkpoint's threads, instead of the training threads'.
        """
        if self.world_size == 1:
            return [value]
        if not writer:
            self.mark("an agreement of all ranks")
        group = self._writer if writer else self._control
        data = json.dumps(value).encode()
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
        # JSON may end in spaces. To rank 0 and from there down a tree: all to all would be as many rounds as ranks.
        mine = _as_bytes(data.ljust(int(longest)))
        parts = [torch.empty_like(mine) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(mine, parts, dst=0, group=group)
        joined = b"[" + b",".join(bytes(part.numpy()) for part in parts) + b"]" if parts is not None else b""
        return list(json.loads(self._from_rank_zero(joined, group)))

    def _from_rank_zero(self, data: bytes, group: dist.ProcessGroup | None) -> bytes:
        """Broadcasts the bytes of rank 0 to every rank."""
        length = torch.tensor(len(data))
        dist.broadcast(length, src=0, group=group)
        held = _as_bytes(data) if self.is_main else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(held, src=0, group=group)
        return bytes(held.numpy())

    def agree(self, problem: str | None) -> None:
        """Raises on every rank if any rank has a problem, with the sentence of the lowest such rank. Collective."""
        problems = self.gather_json(problem)
        for rank, text in enumerate(problems):
            if text is not None:
                raise TrainingFailed(*(text if self.world_size == 1 else f"rank {rank}: {text}").split("\n"))

    def comparison(self) -> Comparison:
        """A new comparison of replicas, to add tensors to."""
        return Comparison(enabled=self.world_size > 1)

    def compare(self, comparison: Comparison, *, writer: bool = True) -> None:
        """Compares what all ranks have added.

        Raises:
            TrainingFailed: some tensor is not the same on every rank; names the first one, and the ranks.
        """
        if self.world_size == 1:
            return
        mine = comparison.result()
        total = hashlib.sha256(json.dumps(sorted(mine.items())).encode()).hexdigest()
        if len(set(self.gather_json(total, writer=writer))) == 1:
            return
        everywhere = self.gather_json(mine, writer=writer)
        for name in mine:
            values = [theirs.get(name) for theirs in everywhere]
            if len(set(values)) > 1:
                common = max(values, key=values.count)  # of equally many, what rank 0 has
                odd = [r for r, v in enumerate(values) if v != common]
                raise TrainingFailed(
                    f"the replicas differ: tensor {name} on rank {', '.join(map(str, odd))} is not that of the other "
                    f"ranks; suspect a faulty device, or a network that draws random numbers of its own; start again "
                    f"from the last checkpoint, without that machine"
                )
        raise TrainingFailed("the replicas differ in the names of their tensors")

    def now_on_device(self) -> torch.cuda.Event | None:
        """A moment of the device's stream that can be waited for; None where there is nothing to wait for."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    # -- time -----------------------------------------------------------------------------------------------------

    def mark(self, place: str) -> None:
        """Publishes a landmark in the background; every rank passes the same landmarks in the same order."""
        if self._heartbeat is not None:
            self._heartbeat.mark(place)

    def lost(self) -> Missing:
        """Dead and hanging ranks, after a collective has failed."""
        return self._heartbeat.missing() if self._heartbeat is not None else Missing(None)

    def shorten_timeout(self) -> None:
        """After the first step a rank that is missing has failed: waits become short."""
        if self._heartbeat is not None:
            self._heartbeat.patience_s = self.section.step_timeout_s
            # The collectives' own end comes later, so that the one with the name of the culprit is heard.
            groups = (dist.group.WORLD, self._control, *self._engine_groups)
            self._set_timeout(self.section.step_timeout_s + COLLECTIVES_LATER_S, groups)

    @staticmethod
    def _set_timeout(seconds: float, groups: Iterable[dist.ProcessGroup | None]) -> None:
        for group in groups:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def peak_memory_bytes(self) -> int:
        """Largest memory of this process so far: the device's on a GPU, the resident set on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def place(self) -> str:
        """Name of the landmark that this rank passed last; empty for a lone process."""
        return self._heartbeat.place if self._heartbeat is not None else ""

    def close(self) -> None:
        """Destroys the process groups, on all ranks together: NCCL waits for every rank.

        Called only after a successful barrier. After a failure, a rank ends its process instead.
        """
        if self._heartbeat is not None:
            self._heartbeat.close()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
