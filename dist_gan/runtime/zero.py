"""The two players under DeepSpeed: ZeRO stages 0 to 3, with exact gradient penalties.

A player is one network with its optimizer; the players are trained in turns. A second derivative through DeepSpeed is
exact under these conditions (each tested by tests/dist):

- Every forward pass calls the module inside the engine. A call of the engine itself would hook the outputs, and
  mistake the `autograd.grad` of a gradient penalty for the backward pass.
- The parameters of the other player are frozen, and each micro-batch has one summed loss and one backward pass.
- Clipping is written into each engine's settings, since DeepSpeed by default clips at 1; gradient accumulation is
  controlled by this module.
- In stage 3, the engine's flag that a backward pass has been made is cleared before each micro-batch.
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
"""Module ID, which no layer has, under which a weight is marked as in use, so that DeepSpeed does not partition it."""
GATHERED_AT_ONCE = 2**26
"""Number of bytes of parameters that ZeRO stage 3 gathers at a time when weights are read."""


def engine_settings(
    launch_options: Mapping[str, Any], *, stage: int, offload: bool, clip: float, elements: int
) -> dict[str, Any]:
    """Returns DeepSpeed's settings for one network: the launch's DeepSpeed file, overridden by the run's settings.

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
    """Returns a player (one network with its optimizer) around a DeepSpeed engine.

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
    """Player in ZeRO stage 0: the engine reduces the gradients, and every rank holds all weights and moments.

    The engine's own step would update the weights even by a gradient that is not finite, so this class calls the
    optimizer's step itself.
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
    """Player in ZeRO stages 1 to 3: each rank holds a part of the moments, from stage 2 on also a part of the gradients,
    and in stage 3 also a part of the weights.
    """

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
            # Otherwise the second micro-batch's gradients would replace those of the first instead of being added to them.
            self._zero.clear_backward_seen_flag()
            self._settle()
            self._hold()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._settle()

    def _hold(self) -> None:
        """Gathers all weights of this player on every rank until its backward pass is done.

        DeepSpeed partitions a layer's weights after the inner derivative of a gradient penalty, and does not gather them
        again for the outer derivative.
        """
        parameters: list[Any] = list(self.parameters.values())
        parameters[0].all_gather(param_list=parameters)
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_HELD)

    def _settle(self) -> None:
        """Partitions all weights of stage 3 again, including weights that a forward or backward pass left gathered.

        If a pass ends inside a frozen network, DeepSpeed's hooks do not partition the last layer, and would fail at the
        next pass.
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
        self._engine.step()  # updates no weight if the norm is not finite; clears the gradients
        if bool(self._zero.overflow) == applied:
            raise TrainingFailed(
                f"{self.name}: DeepSpeed {'skipped' if applied else 'made'} an update by a gradient of norm {norm}; start "
                f"again from the last checkpoint, with another version of DeepSpeed or under DDP"
            )
        if applied:
            self._iterate_spectral()
        return Update(self.name, norm, applied, culprit)

    def _norm(self) -> float:
        """Returns the norm of the whole reduced gradient, over the parts of all ranks."""
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
        """Flat tensors of this rank's parts of the weights, which the optimizer updates; one tensor for each group."""
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
        owner.requires_grad_(True)  # DeepSpeed returns no moments of a frozen parameter
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
        """Returns this rank's part of a whole parameter, flat; the parts of the last ranks are padded with zeros."""
        size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        padded = torch.zeros(size * dist.get_world_size(), dtype=whole.dtype, device=whole.device)
        padded[: whole.numel()] = whole.flatten()
        return padded.narrow(0, size * dist.get_rank(), size)
