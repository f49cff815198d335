"""Settings of the launcher (parallel strategy, precision, offload), read from the environment variables that it sets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_gan.config import RunConfig
from dist_gan.types import UserError

_GPU_NAMES = re.compile(r"(\d+|GPU-[\w-]+|MIG-[\w-]+)(,(\d+|GPU-[\w-]+|MIG-[\w-]+))*")
_PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16", "fp64": "fp64"}
_OTHER_STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_DEEPSPEED_FILE_KEYS = ("zero_optimization", "communication_data_type", "comms_logger", "wall_clock_breakdown")
_ALREADY_OURS = {
    "optimizer": "the optimizers belong to the recipe (g_optim, d_optim)",
    "scheduler": "learning rates belong to the recipe (g_optim.lr, d_optim.lr)",
    "gradient_clipping": "clipping belongs to the recipe (g_optim.clip, d_optim.clip)",
    "fp16": "fp16 overflows in gradient penalties; say mixed_precision: bf16 in the launch file",
    "bf16": "DeepSpeed's bf16 turns the weights themselves; say mixed_precision: bf16 in the launch file",
    "gradient_accumulation_steps": "accumulation belongs to the recipe (runtime.micro_batch)",
    "train_batch_size": "the batch belongs to the recipe (run.batch)",
    "train_micro_batch_size_per_gpu": "the batch belongs to the recipe (run.batch, runtime.micro_batch)",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "gradient_clipping": (0, 0.0, None, "auto"),
    "gradient_accumulation_steps": (1, "auto"),
    "train_batch_size": ("auto",),
    "train_micro_batch_size_per_gpu": ("auto",),
    "fp16": ({"enabled": False}, {"enabled": "auto"}),
    "bf16": ({"enabled": False}, {"enabled": "auto"}),
}


@dataclass(frozen=True)
class LaunchSettings:
    """Parallel strategy and precision requested by the launcher."""

    strategy: str = "single"
    """Parallel strategy: `single`, `ddp`, or `zero0` to `zero3`."""
    precision: str = "fp32"
    """Precision of the forward passes: `fp32`, `bf16` (by `torch.autocast`) or `fp64`."""
    offload: bool = False
    """True if ZeRO keeps the optimizers' moments in the host's memory."""
    zero_options: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the launch's DeepSpeed file that do not change what is learned, `zero_optimization` among them."""

    @property
    def zero_stage(self) -> int | None:
        """Stage of DeepSpeed's ZeRO, from 0 to 3; None without DeepSpeed."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else None


def read_launch_settings(config: RunConfig, environment: Mapping[str, str], *, gpus: int) -> LaunchSettings:
    """Reads the strategy and precision of a launch, and checks that they fit the recipe and this machine.

    Args:
        config: the recipe.
        environment: environment variables that `accelerate launch` or `torchrun` has set.
        gpus: number of CUDA devices that this process sees.

    Raises:
        UserError: one report of all settings of the launch that are not supported.
    """
    world_size, local = int(environment.get("WORLD_SIZE", "1")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    mistakes = [
        f"{name} in the launch file: not offered; choose distributed_type MULTI_GPU (DDP) or DEEPSPEED"
        for variable, name in _OTHER_STRATEGIES.items()
        if environment.get(variable, "false").lower() == "true"
    ]
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        mistakes.append(
            f"dynamo_backend: {backend!r} of the launch file: compiled networks cannot be differentiated twice, and "
            f"gradient penalties need that; leave dynamo out of the launch file"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if gpus == 0 and config.runtime.device == "cuda":
        mistakes.append(
            "runtime.device: 'cuda', and torch finds no GPU here; set runtime.device=auto, or install torch for CUDA"
        )
    elif gpus == 0 and config.runtime.device == "auto" and _GPU_NAMES.fullmatch(visible):
        mistakes.append(
            f"gpu_ids: the launch asks for the GPUs {visible} (CUDA_VISIBLE_DEVICES), and torch finds none here; take "
            f"launch/cpu.yaml, install torch for CUDA, or set runtime.device=cpu"
        )
    elif 0 < gpus < local and config.runtime.device != "cpu":
        mistakes.append(
            f"num_processes: {local} processes on this machine and {gpus} GPUs; start one process a GPU "
            f"(processes of all machines together: GPUs a machine x machines)"
        )
    precision, problem = _precision(config, environment)
    mistakes += problem
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        launch = LaunchSettings("ddp" if world_size > 1 else "single", precision)
    else:
        if gpus == 0 or config.runtime.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported, in the next statement
        launch, problems = _deepspeed(config, environment, precision)
        mistakes += problems
    if config.runtime.compress != "none" and launch.strategy not in ("ddp", "single"):
        mistakes.append(
            f"runtime.compress: {config.runtime.compress!r} is a hook of DDP, and the launch file asks for "
            f"{launch.strategy}; leave it out, or set communication_data_type in a DeepSpeed file"
        )
    if mistakes:
        raise UserError(*["the launch does not fit:", *mistakes] if len(mistakes) > 1 else mistakes)
    return launch


def _precision(config: RunConfig, environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """Returns the precision and a list of mistakes: `runtime.precision`, or for `auto` the precision of the launch file."""
    launched, wanted = environment.get("ACCELERATE_MIXED_PRECISION", "no"), config.runtime.precision
    if launched not in _PRECISIONS:
        return "fp32", [
            f"mixed_precision: {launched!r} of the launch file is not offered; choose no or bf16 "
            f"(fp16 overflows in gradient penalties)"
        ]
    if wanted == "auto":
        return _PRECISIONS[launched], []
    if launched == "bf16" and wanted != "bf16":
        return wanted, [
            f"runtime.precision: {wanted!r} contradicts mixed_precision 'bf16' of the launch file; "
            f"set one of them, or runtime.precision=auto"
        ]
    return wanted, []


def _deepspeed(config: RunConfig, environment: Mapping[str, str], precision: str) -> tuple[LaunchSettings, list[str]]:
    def given(name: str, default: str = "none") -> str:
        return environment.get(f"ACCELERATE_{name}", default).lower()

    mistakes = []
    try:
        import deepspeed  # noqa: F401
        import transformers  # noqa: F401 - accelerate wants it for any use of DeepSpeed
    except ImportError as error:
        mistakes.append(
            f"distributed_type: DEEPSPEED in the launch file, but {error.name or error} is not installed here; "
            f"pip install -e '.[deepspeed]', or take a launch file without DeepSpeed"
        )
    options, problems = _deepspeed_file(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    mistakes += problems
    stage = str(options.get("zero_optimization", {}).get("stage", given("DEEPSPEED_ZERO_STAGE", "2")))
    if stage not in ("0", "1", "2", "3"):
        mistakes.append(f"zero_stage: {stage!r} of the launch file: ZeRO has the stages 0, 1, 2 and 3")
        stage = "2"
    if given("GRADIENT_CLIPPING") not in ("none", "0", "0.0", "auto"):
        mistakes.append(
            f"gradient_clipping: {given('GRADIENT_CLIPPING')} in the launch file; clipping belongs to the recipe: take it out, "
            f"and set g_optim.clip and d_optim.clip"
        )
    if given("GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "none", "auto"):
        mistakes.append(
            f"gradient_accumulation_steps: {given('GRADIENT_ACCUMULATION_STEPS')} in the launch file; accumulation belongs to "
            f"the recipe: take it out, and set runtime.micro_batch"
        )
    if given("DEEPSPEED_OFFLOAD_PARAM_DEVICE") != "none":
        mistakes.append(
            "offload_param_device: parameters of a generator and a discriminator are small beside their activations, "
            "and fetching them for a second derivative was never measured right; take it out"
        )
    offload = given("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
    offload = str(options.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", offload))
    if offload not in ("none", "cpu"):
        mistakes.append(f"offload_optimizer_device: {offload!r}: only cpu is offered")
    if offload != "none" and stage == "0":
        mistakes.append("offload_optimizer_device: stage 0 has nothing to offload; choose zero_stage 1, 2 or 3")
    if precision == "fp64":
        mistakes.append("runtime.precision: 'fp64' is for proofs with one process or DDP; ZeRO works in fp32")
    return LaunchSettings(f"zero{stage}", precision, offload != "none", options), mistakes


def _deepspeed_file(path: str | None) -> tuple[dict[str, Any], list[str]]:
    """Reads a DeepSpeed file; returns its supported entries, and a mistake for each entry that the file may not set.

    Args:
        path: path of the JSON file; None or `none` if the launch has no such file.
    """
    if path is None or path == "none":
        return {}, []
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"deepspeed_config_file: {path}: is no readable JSON ({error}); mend it, or take it out"]
    if not isinstance(options, dict) or not isinstance(options.get("zero_optimization", {}), dict):
        return {}, [f"deepspeed_config_file: {path}: an object with `zero_optimization` is needed"]
    mistakes = []
    for key, value in options.items():
        if key in _DEEPSPEED_FILE_KEYS or value in _HARMLESS.get(key, ()):
            continue
        reason = _ALREADY_OURS.get(key, f"not offered; offered are {', '.join(_DEEPSPEED_FILE_KEYS)}")
        mistakes.append(f"deepspeed_config_file: {key} in {path}: {reason}; take it out of that file")
    if "offload_param" in options.get("zero_optimization", {}):
        mistakes.append(f"deepspeed_config_file: offload_param in {path}: not offered; take it out of that file")
    return {key: value for key, value in options.items() if key in _DEEPSPEED_FILE_KEYS}, mistakes
