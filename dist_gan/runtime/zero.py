"""The two players under DeepSpeed: ZeRO stages 0 to 3, with exact gradient penalties.

A second derivative through DeepSpeed holds under these conditions (each measured by tests/dist):

- every forward pass goes to the module inside the engine: the engine's own call hooks the outputs, and takes the
  `autograd.grad` of a penalty for the backward pass;
- the resting player's parameters are frozen, and each turn has one summed loss and one backward a micro-batch;
- clipping is written into each engine's settings (unsaid, DeepSpeed clips at 1), accumulation is steered by hand;
- in stage 3 the engine has to forget, before each micro-batch, that it has seen a backward pass.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_gan.runtime.player import Player, TorchPlayer, Update, set_rates
from dist_gan.types import TrainingFailed

_HELD = -1
"""No layer's number: DeepSpeed frees no weight that some layer is said to be using."""
GATHERED_AT_ONCE = 2**26
"""Bytes of parameters that stage 3 makes whole at a time."""


def engine_settings(
    launch_options: Mapping[str, Any], *, stage: int, offload: bool, clip: float, elements: int
) -> dict[str, Any]:
    """DeepSpeed's settings for one player: the launch's DeepSpeed file, overridden by the run's settings.

    Args:
        launch_options: `zero_optimization` and the other entries of the launch's DeepSpeed file.
        stage: ZeRO stage.
        offload: True to keep the optimizer's moments in the host's memory.
        clip: largest norm of the whole gradient; 0 for no clipping.
        elements: total number of elements of the player's parameters.
    """
    zero = dict(launch_options.get("zero_optimization", {})) | {"stage": stage}
    bucket = zero.get("reduce_bucket_size")
    # DeepSpeed allocates the whole bucket, by default 5e8 elements; all gradients together have only `elements`.
    zero["reduce_bucket_size"] = min(int(bucket), elements) if isinstance(bucket, int | float) else elements
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()} | dict(
            zero.get("offload_optimizer", {})
        )
    return {
        **launch_options,
        "zero_optimization": zero,
        "gradient_clipping": clip,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def engine_player(
    name: str,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    *,
    stage: int,
    clip: float,
    settings: Mapping[str, Any],
) -> Player:
    """A player around a DeepSpeed engine.

    Args:
        name: `generator` or `discriminator`.
        engine: engine returned by `deepspeed.initialize`.
        optimizer: optimizer that was passed to the engine.
        stage: ZeRO stage.
        clip: largest norm of the whole gradient; 0 for no clipping.
        settings: settings of the engine; the ZeRO entries determine the order in which gradients are summed.
    """
    told = json.dumps({"stage": stage, **settings["zero_optimization"]}, sort_keys=True, default=str)
    layout = f"zero{stage}, {hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if stage == 0:
        return ReplicatedEnginePlayer(name, engine, optimizer, clip=clip, layout=layout)
    return PartitionedPlayer(name, engine, stage=stage, clip=clip, layout=layout)


class ReplicatedEnginePlayer(TorchPlayer):
    """Stage 0: the engine reduces the gradients, everything else is whole on every rank.

    The engine's own step would move the weights by gradients that are not finite, so the optimizer is stepped here.
    """

    def __init__(
        self, name: str, engine: Any, optimizer: torch.optim.Optimizer, *, clip: float, layout: str
    ) -> None:  # fmt: skip
        super().__init__(name, engine.module, engine.module, optimizer, clip=clip, layout=layout)
        self._engine = engine

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)


class PartitionedPlayer(Player):
    """Stages 1 to 3: each rank owns a part of the moments (1), of the gradients (2), of the weights (3)."""

    def __init__(self, name: str, engine: Any, *, stage: int, clip: float, layout: str) -> None:
        super().__init__(name, engine.module, engine.module, clip=clip, layout=layout)
        self._engine = engine
        self._zero = engine.optimizer
        self._stage = stage

    def rest(self) -> None:
        super().rest()
        self._settle()

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        if self._stage == 3:
            # Otherwise the second micro-batch's gradients replace the first one's instead of being added.
            self._zero.clear_backward_seen_flag()
            self._settle()
            self._hold()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._settle()

    def _hold(self) -> None:
        """Makes this player's weights whole until its backward pass is done.

        DeepSpeed frees a layer's weights once the inner derivative of a penalty has passed it, and does not fetch
        them again for the outer one.
        """
        parameters: list[Any] = list(self.parameters.values())
        parameters[0].all_gather(param_list=parameters)
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_HELD)

    def _settle(self) -> None:
        """Takes the weights of stage 3 apart again, those too that a pass has left whole.

        Where a pass ends inside a frozen network DeepSpeed's hooks miss the last layer, and would stumble over it.
        """
        if self._stage < 3:
            return
        for parameter in self.parameters.values():
            held: Any = parameter
            held.ds_active_sub_modules.clear()
            if not held.ds_persist:
                held.partition()

    def update(self, *, lr: float, beta2: float) -> Update:
        norm = self._norm()
        applied = math.isfinite(norm)
        culprit = None if applied else self._first_not_finite()
        set_rates(self._zero, lr=lr, beta2=beta2)
        self._engine.step()  # leaves the weights alone where the norm is not finite, and clears the gradients
        if bool(self._zero.overflow) == applied:
            raise TrainingFailed(
                f"{self.name}: DeepSpeed {'skipped' if applied else 'made'} an update by a gradient of norm {norm}; start "
                f"again from the last checkpoint, with another version of DeepSpeed or under DDP"
            )
        if applied:
            self._iterate_spectral()
        return Update(self.name, norm, applied, culprit)

    def _norm(self) -> float:
        """Norm of the reduced gradient, over the parts of all ranks."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self._stage == 3:
            return float(combine_grad_norm_groups(self._zero._get_norm_groups()))
        return float(self._zero.scaled_global_norm())

    def _first_not_finite(self) -> str:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.parameters.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None and not bool(gradient.isfinite().all()):
                return f"{self.name}/{name}"
        return f"{self.name} (every gradient is finite, the norm of all is not)"

    # -- its tensors ----------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[dict[str, Tensor]]:
        if self._stage < 3:
            yield {name: p.detach() for name, p in self.parameters.items()}
            return
        import deepspeed

        self._settle()
        for part in self._parts():
            with deepspeed.zero.GatheredParameters(list(part.values())):
                yield {name: p.detach() for name, p in part.items()}

    def _parts(self) -> Iterator[dict[str, nn.Parameter]]:
        part: dict[str, nn.Parameter] = {}
        held = 0
        for name, parameter in self.parameters.items():
            size = math.prod(self._shapes[name]) * parameter.element_size()
            if part and held + size > GATHERED_AT_ONCE:
                yield part
                part, held = {}, 0
            part[name] = parameter
            held += size
        yield part

    @property
    def _flat(self) -> list[Tensor]:
        """This rank's parts of the weights, laid end to end: what the optimizer steps."""
        return list(
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def moment_names(self) -> tuple[str, ...]:
        state = self._zero.optimizer.state.get(self._flat[0], {})
        return tuple(sorted(key for key, value in state.items() if isinstance(value, Tensor)))

    def full_moment(self, parameter: str, key: str) -> Tensor:
        if key == "step":
            return self._zero.optimizer.state[self._flat[0]]["step"]
        from deepspeed.utils import safe_get_full_optimizer_state

        owner = self.parameters[parameter]
        owner.requires_grad_(True)  # a frozen parameter's moments are not given out
        return safe_get_full_optimizer_state(owner, key)

    @torch.no_grad()
    def load_full_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        keys = self._check_names(tensors)
        steps = {float(tensors[f"optimizer/{name}/step"]) for name in self.parameters} if "step" in keys else set()
        if len(steps) > 1:
            raise ValueError(
                f"{self.name}: the parameters have taken {sorted(steps)} steps, and ZeRO counts one number"
            )
        self.module.requires_grad_(True)
        self._settle()
        self._load_weights(tensors)
        self._load_buffers(tensors)
        state = self._zero.optimizer.state
        state.clear()
        if keys:
            for flat in self._flat:
                state[flat] = {
                    key: torch.tensor(steps.copy().pop(), device=flat.device)
                    if key == "step"
                    else torch.zeros_like(flat)
                    for key in keys
                }
            self._load_moments(tensors, keys)

    def _load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        if self._stage < 3:
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights/{name}"])
            self._zero.refresh_fp32_params()
            return
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        for name, parameter in self.parameters.items():
            whole = tensors[f"weights/{name}"].to(parameter.device)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(whole)
            safe_set_local_fp32_param(parameter, self._my_part(parameter, whole))

    def _load_moments(self, tensors: Mapping[str, Tensor], keys: tuple[str, ...]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for key in keys:
                if key == "step":
                    continue
                whole = tensors[f"optimizer/{name}/{key}"].to(parameter.device)
                if self._stage < 3:
                    safe_set_full_optimizer_state(parameter, whole, key)
                else:
                    safe_set_local_optimizer_state(parameter, self._my_part(parameter, whole), key)

    @staticmethod
    def _my_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's stretch of a parameter, the last ones filled up with zeros."""
        size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        padded = torch.zeros(size * dist.get_world_size(), dtype=whole.dtype, device=whole.device)
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, size * dist.get_rank(), size)
