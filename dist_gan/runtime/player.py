"""A player of the two-player game: one network with its optimizer, wrapped for the strategy of the launch."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_gan.config import AdamSection, SGDSection


class Update(NamedTuple):
    """What became of one update."""

    norm: float
    """Norm of the reduced gradient before clipping: the same on every rank, and so their vote on finiteness."""
    applied: bool
    """Whether the weights moved."""
    culprit: str | None
    """First parameter whose gradient was not finite."""


class Player:
    """One network and its optimizer under single-process or DDP training.

    Args:
        name: `generator` or `discriminator`.
        module: the network itself, for evaluation, for the other player's turn, and for its tensors.
        wrapped: what is called in its own turn; the module, or DDP around it.
        section: the optimizer's settings.
    """

    def __init__(self, name: str, module: nn.Module, wrapped: nn.Module, *, section: AdamSection | SGDSection) -> None:
        self.name = name
        self.module = module
        self.wrapped = wrapped
        self.clip = section.clip
        self._parameters = dict(module.named_parameters())
        self.optimizer = _build_optimizer(list(self._parameters.values()), section)

    def without_reduction(self) -> AbstractContextManager[Any]:
        """Encloses the forward passes of every micro-batch but the last."""
        return self.wrapped.no_sync() if isinstance(self.wrapped, DistributedDataParallel) else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the loss' gradient to the parameters'."""
        loss.backward()

    def update(self, *, lr: float, beta2: float) -> Update:
        """Clips, and moves the weights unless the gradient's norm is not finite; gradients are cleared either way.

        Reading the norm is the one host synchronisation of a turn.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        assert gradients, f"the {self.name}'s loss reaches none of its parameters"
        norm_tensor = torch.nn.utils.get_total_norm(gradients)
        norm = float(norm_tensor)
        applied = math.isfinite(norm)
        culprit = None
        if applied:
            if 0 < self.clip < norm:
                torch._foreach_mul_(gradients, self.clip / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
                if "betas" in group:
                    group["betas"] = (group["betas"][0], beta2)
            self.optimizer.step()
        else:
            culprit = self._first_not_finite()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied, culprit)

    def _first_not_finite(self) -> str:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"{self.name}/{name}"
        return f"{self.name} (every gradient is finite, the norm of all is not)"

    def full_tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and the optimizer's moments by name: live tensors, whole, on every rank."""
        found: dict[str, Tensor] = {f"weights/{name}": p.detach() for name, p in self._parameters.items()}
        found |= {f"buffers/{name}": b for name, b in self.module.named_buffers()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{name}/{key}"] = value
        return found

    @torch.no_grad()
    def load_full_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `full_tensors` gave, from any strategy; names must match exactly."""
        own: dict[str, Tensor] = {f"weights/{name}": p for name, p in self._parameters.items()}
        own |= {f"buffers/{name}": b for name, b in self.module.named_buffers()}
        moments = sorted(name for name in tensors if name.startswith("optimizer/"))
        missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys() - set(moments)
        if missing or unknown:
            raise ValueError(f"{self.name}: tensors missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}")
        for name, place in own.items():
            place.copy_(tensors[name])
        self.optimizer.state.clear()
        for name in moments:
            parameter_name, key = name.removeprefix("optimizer/").rsplit("/", 1)
            parameter = self._parameters[parameter_name]
            self.optimizer.state[parameter][key] = tensors[name].to(parameter.device).clone()

    tensors, load_tensors = full_tensors, load_full_tensors

    def values(self) -> dict[str, Any]:
        """Nothing but tensors is kept: learning rates are functions of the images seen."""
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        """Nothing but tensors is kept."""
        assert not values


def _build_optimizer(parameters: list[nn.Parameter], section: AdamSection | SGDSection) -> torch.optim.Optimizer:
    """torch's fused optimizers; learning rate and beta2 are set at every update."""
    if isinstance(section, SGDSection):
        return torch.optim.SGD(
            parameters, lr=0.0, momentum=section.momentum, weight_decay=section.weight_decay, fused=True
        )
    kind = torch.optim.AdamW if section.kind == "adamw" else torch.optim.Adam
    return kind(
        parameters,
        lr=0.0,
        betas=(section.beta1, 0.999),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )
