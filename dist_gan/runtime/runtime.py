"""One process of a training run: rank, device, precision, process groups, and the two players.

A player is a network (generator or discriminator) with its optimizer, wrapped for DDP or DeepSpeed.
"""

from __future__ import annotations

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
from dist_gan.optimizers import OptimizerSettings, build_optimizer
from dist_gan.runtime.accelerators import make_accelerators
from dist_gan.runtime.batchnorm import synchronise_batchnorm
from dist_gan.runtime.buckets import BucketedNetwork, lay_out
from dist_gan.runtime.groups import FIRST_REDUCTION_S, first_reduction, join
from dist_gan.runtime.heartbeat import Heartbeat
from dist_gan.runtime.launch_settings import LaunchSettings
from dist_gan.runtime.launcher import find_launcher
from dist_gan.runtime.lost_ranks import LostRanks
from dist_gan.runtime.meeting import EndNotice, Meeting, open_meeting
from dist_gan.runtime.numerics import set_numerics
from dist_gan.runtime.player import Player, TorchPlayer
from dist_gan.runtime.rank_group import RankGroup
from dist_gan.types import Network, Networks, TrainingFailed, UserError
from dist_gan.wording import safe

COLLECTIVE_MARGIN_S = 30
"""Seconds by which the time limit of a collective exceeds that of the heartbeat.

The heartbeat thus fails first, and names the lost rank; the error of a collective that times out names no rank.
"""


class Runtime:
    """One process of a training run.

    A process has three groups of all ranks, so that no reduction waits for a reduction of another kind.

    - `training_group` reduces tensors on the training device, with NCCL on GPUs and with gloo on CPUs.
    - `control_group` exchanges the decisions of the training thread, in tensors on the CPU, with gloo.
    - `writer_group` exchanges messages of the thread that writes checkpoints, with gloo.

    Args:
        section: settings of devices, precision and processes.
        launch_settings: settings from the launcher's environment.
        meeting: the launch's key-value store, which all ranks have joined; None to connect to the store here.
        on_lost: function that is called with the lost ranks before this process ends because of them.
        on_notice: function that is called with another rank's message that the launch is over, before this process ends.
    """

    def __init__(
        self,
        section: RuntimeSection,
        launch_settings: LaunchSettings,
        *,
        meeting: Meeting | None = None,
        on_lost: Callable[[LostRanks], object] | None = None,
        on_notice: Callable[[EndNotice], object] | None = None,
    ) -> None:
        self.section = section
        self.launch_settings = launch_settings
        self.precision = launch_settings.precision
        self._set_threads()
        set_numerics(section)
        on_cpu = section.device == "cpu" or not torch.cuda.is_available()
        timeout = timedelta(seconds=section.start_timeout_s)
        meeting = meeting or open_meeting(os.environ, patience_s=section.start_timeout_s)
        self.meeting: Meeting | None = None
        """The launch's key-value store, over the connection that the heartbeats use; None in a launch of one process."""
        self._heartbeat: Heartbeat | None = None
        if meeting is not None:
            self.meeting = meeting.reconnect()
            # Started before the groups, so that a rank that dies while they are being created is detected, too.
            self._heartbeat = Heartbeat(
                self.meeting,
                patience_s=section.start_timeout_s,
                launcher=find_launcher(os.environ),
                on_lost=on_lost or (lambda lost: print(safe(f"dist_gan: {lost.reason}"), flush=True)),
                on_notice=on_notice or (lambda notice: None),
            )
            join(meeting, on_cpu=on_cpu, timeout=timeout)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        self._accelerators = make_accelerators(section, launch_settings, on_cpu=on_cpu, timeout=timeout)
        accelerator = self._accelerators["generator"]
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        if self.world_size != launched:
            raise TrainingFailed(f"{launched} processes were launched, and {self.world_size} found each other")
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        training = control = writer = None
        if self.world_size > 1:
            training = dist.group.WORLD
            control = dist.new_group(backend="gloo", timeout=timeout)
            writer = dist.new_group(backend="gloo", timeout=timeout)
        self.training_group = RankGroup(training, rank=self.rank, world_size=self.world_size)
        self.control_group = RankGroup(
            control, rank=self.rank, world_size=self.world_size, heartbeat=self._heartbeat
        )  # fmt: skip
        self.writer_group = RankGroup(writer, rank=self.rank, world_size=self.world_size)
        self._engine_groups: list[dist.ProcessGroup] = []
        if self.world_size > 1:
            self._reduce_once()

    def _reduce_once(self) -> None:
        cpu = torch.device("cpu")
        groups = {
            "the processes" if self.device.type == "cpu" else "the GPUs": (self.training_group, self.device),
            "the control group": (self.control_group, cpu),
            "the checkpoints' group": (self.writer_group, cpu),
        }
        limit = min(FIRST_REDUCTION_S, self.section.start_timeout_s / 2)  # shorter than the heartbeat's time limit
        first_reduction(groups, world_size=self.world_size, timeout_s=limit)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the logs."""
        return self.rank == 0

    def _set_threads(self) -> None:
        """Sets torch's number of threads: by default, this machine's cores divided by its number of processes.

        A launcher's default, one thread a process, is overridden.
        """
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self.section.threads or max(1, cores // local)
        torch.set_num_threads(threads)
        # Where no launcher has set it (torchrun with one process a machine), accelerate would set threads of its own.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))

    def describe(self) -> dict[str, Any]:
        """Returns number of processes, device, precision, threads and strategy, for the first event in the run's log."""
        return {
            "world_size": self.world_size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "precision": self.precision + ("+tf32" if self.section.tf32 else ""),
            "threads": torch.get_num_threads(),
            "strategy": self.launch_settings.strategy + ("+offload" if self.launch_settings.offload else ""),
        }

    @property
    def summary(self) -> str:
        """Text of one line with number of processes, device, strategy and precision, printed when the run starts."""
        facts = self.describe()
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{processes} on {facts['device']}, {facts['strategy']}, {facts['precision']}"

    @staticmethod
    def packages() -> dict[str, str]:
        """Returns the versions of the packages that wrap the networks, by the name of the package."""
        return {"accelerate": accelerate.__version__}

    def seed(self, value: int) -> None:
        """Seeds torch's random generators of the CPU and of this process's device, which dropout and noise in networks use.

        `torch.manual_seed` gives the same numbers, but seeds every backend that torch knows, which takes 0.2 ms a call.
        """
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    # -- the two players ------------------------------------------------------------------------------------------

    def players(
        self, networks: Networks, *, g_optim: OptimizerSettings, d_optim: OptimizerSettings
    ) -> tuple[Player, Player]:
        """Moves both networks to the device, wraps them, and builds their optimizers; returns both players.

        In ZeRO stage 3 the networks' weights are partitioned in place; whole weights have to be copied before this call.

        Args:
            networks: generator and discriminator.
            g_optim: settings of the generator's optimizer.
            d_optim: settings of the discriminator's optimizer.
        """
        return (
            self._player("generator", networks.generator, g_optim),
            self._player("discriminator", networks.discriminator, d_optim),
        )

    def _player(self, name: str, module: nn.Module, section: OptimizerSettings) -> Player:
        module = module.to(device=self.device, dtype=self.dtype)
        if self.section.sync_batchnorm:
            module = synchronise_batchnorm(module)
        optimizer = build_optimizer(list(module.parameters()), section)
        accelerator = self._accelerators[name]
        if self.launch_settings.zero_stage is None:
            if self.world_size == 1:
                wrapped, prepared = accelerator.prepare(module, optimizer)
                return TorchPlayer(name, module, wrapped, prepared, clip=section.clip)
            with warnings.catch_warnings():
                # torch 2.13 renames broadcast_buffers; accelerate knows the old name only, and torch 2.11 too.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
                wrapped, prepared = accelerator.prepare(BucketedNetwork(module), optimizer)
            layout = lay_out(wrapped)
            return TorchPlayer(name, module, wrapped, prepared, clip=section.clip, layout=layout)
        from dist_gan.runtime.zero import engine_player, engine_settings

        stage = self.launch_settings.zero_stage
        settings = engine_settings(
            self.launch_settings.zero_options,
            stage=stage,
            offload=self.launch_settings.offload,
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
        """Context for the forward passes of a turn, in which one player is trained and the other one is frozen.

        Yields the generator and the discriminator to call. The frozen player is called without its wrapper, so none of
        its gradients is reduced. The backward pass belongs after the context, since its kernels take their precision
        from the forward pass.

        Args:
            active: player that is trained.
            resting: player that is frozen.
            last_micro: True for the last micro-batch of the update, after which the gradients are reduced.
        """
        self.mark(f"the {active.name}'s turn")
        active.module.requires_grad_(True)
        resting.rest()
        with active.accumulate(last=last_micro), self._autocast():
            if active.name == "generator":
                yield active.forward_module, resting.module
            else:
                yield resting.module, active.forward_module

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @torch.no_grad()
    def average_buffers(self, *players: Player) -> None:
        """Averages the floating-point buffers over all ranks, in one reduction, so that replicas stay bitwise equal."""
        if self.world_size == 1:
            return
        buffers = [b for player in players for b in player.module.buffers() if b.is_floating_point()]
        if buffers:
            flat = self.training_group.mean(torch.cat([b.reshape(-1) for b in buffers]))
            pieces = flat.split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(pieces, buffers, strict=True)])

    # -- slots of the global batch --------------------------------------------------------------------------------

    def slots(self, batch: int) -> Tensor:
        """Returns the slots (positions in the global batch) of this rank: every `world_size`-th, from `rank` on, int64.

        Args:
            batch: number of samples of the global batch.

        Raises:
            UserError: the number of samples is not divisible by the number of processes.
        """
        if batch % self.world_size:
            raise UserError(f"run.batch: {batch} images do not divide over {self.world_size} processes")
        return torch.arange(self.rank, batch, self.world_size)

    def now_on_device(self) -> torch.cuda.Event | None:
        """Records an event in the device's current stream, for which another stream can wait; returns None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    # -- time -----------------------------------------------------------------------------------------------------

    def mark(self, landmark: str) -> None:
        """Counts a landmark as passed: this rank begins the part of training that `landmark` names.

        The heartbeat publishes the number of passed landmarks. Every rank passes the same landmarks in the same order,
        so a rank that has passed fewer than the others is slower than them, or hangs.
        """
        if self._heartbeat is not None:
            self._heartbeat.mark(landmark)

    @property
    def landmark(self) -> str:
        """Name of the landmark (named point of training) that this rank passed last; empty in a launch of one process."""
        return self._heartbeat.landmark if self._heartbeat is not None else ""

    def find_lost_ranks(self) -> LostRanks:
        """Returns the dead, silent and hanging ranks after a collective has failed; takes a few seconds to find them."""
        return self._heartbeat.find_lost_ranks() if self._heartbeat is not None else LostRanks(None)

    def shorten_timeout(self) -> None:
        """Limits all waits for other ranks to `runtime.step_timeout_s`; called after the first training step.

        Before that, one rank may be minutes behind another, while it reads the data set or compiles kernels.
        """
        if self._heartbeat is not None:
            self._heartbeat.patience_s = self.section.step_timeout_s
            groups = (self.training_group.process_group, self.control_group.process_group, *self._engine_groups)
            self._set_timeout(self.section.step_timeout_s + COLLECTIVE_MARGIN_S, groups)

    @staticmethod
    def _set_timeout(seconds: float, groups: Iterable[dist.ProcessGroup | None]) -> None:
        for group in groups:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def peak_memory_bytes(self) -> int:
        """Returns the peak memory of this process in bytes: allocated memory of the GPU, or resident memory on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Ends the heartbeats and destroys the process groups, on all ranks together, since NCCL waits for every rank.

        This method is called only after a successful barrier; after a failure, a rank ends its process instead.
        """
        if self._heartbeat is not None:
            self._heartbeat.close()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
