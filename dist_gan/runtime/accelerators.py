"""Accelerator objects, which wrap the networks: a shared one without DeepSpeed, one per network with DeepSpeed."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)

from dist_gan.config import RuntimeSection
from dist_gan.runtime.launch_settings import LaunchSettings
from dist_gan.types import UserError


def make_accelerators(
    section: RuntimeSection, launch: LaunchSettings, *, on_cpu: bool, timeout: timedelta
) -> dict[str, Accelerator]:
    """Returns the Accelerator of each network, by its name: `generator` and `discriminator`.

    Args:
        section: settings of devices, precision and processes.
        launch: settings from the launcher's environment.
        on_cpu: True if the processes train on CPUs.
        timeout: time limit of a collective.

    Raises:
        UserError: gradient compression is requested on CPUs; DDP offers it on GPUs only.
    """
    if launch.zero_stage is not None:
        return _for_deepspeed(launch.zero_stage, on_cpu=on_cpu, timeout=timeout)
    if section.compress != "none" and on_cpu and launch.strategy == "ddp":
        raise UserError(
            f"runtime.compress: {section.compress!r} is for gradients on GPUs, and these processes train on CPUs; leave it out"
        )
    handlers = [_ddp_arguments(section), InitProcessGroupKwargs(timeout=timeout)]
    # Without `cpu=True`, accelerate would not connect the processes on CPUs unless the launch file asks for CPUs.
    both = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    return {"generator": both, "discriminator": both}


def _ddp_arguments(section: RuntimeSection) -> DistributedDataParallelKwargs:
    hook = DDPCommunicationHookType.BF16 if section.compress == "bf16" else DDPCommunicationHookType.NO
    return DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook)


def _for_deepspeed(stage: int, *, on_cpu: bool, timeout: timedelta) -> dict[str, Accelerator]:
    """Returns two Accelerators, by the name of the network, since an Accelerator keeps only one DeepSpeed engine."""
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)  # already read, and part of the engines' settings
    if on_cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        _without_compiled_sums()
    plugins = {
        name: DeepSpeedPlugin(
            zero_stage=stage,
            gradient_accumulation_steps=1,
            gradient_clipping=0.0,
            offload_optimizer_device="none",
            offload_param_device="none",
            zero3_init_flag=False,
        )
        for name in ("generator", "discriminator")
    }
    group = InitProcessGroupKwargs(timeout=timeout, **({"backend": "gloo"} if on_cpu else {}))
    first = Accelerator(mixed_precision="no", deepspeed_plugins=plugins, kwargs_handlers=[group])
    return {"generator": first, "discriminator": Accelerator()}


def _without_compiled_sums() -> None:
    """Prevents DeepSpeed from compiling a shared-memory all-reduce for CPUs when it starts; gloo reduces instead.

    A process that is killed during this compilation leaves a lock file, for which every later start would wait for ever.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
