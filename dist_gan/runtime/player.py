"""Players of the two-player game: a player is one network with its optimizer, under a parallel strategy.

`TorchPlayer` trains on one process or with DDP; the players for DeepSpeed are in dist_gan.runtime.zero. Every player
gives and takes its tensors unsharded, by the names of the parameters, so that a checkpoint can be read under another
strategy than the one that wrote it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_gan.models.spectral import spectral_weights
from dist_gan.types import TensorFacts, TrainingFailed


class Update(NamedTuple):
    """Result of one update of a player, that is, of one network's weights."""

    player: str
    """Name of the player: `generator` or `discriminator`."""
    norm: float
    """Norm of the reduced gradient before clipping, equal on every rank, so that all ranks skip the same updates."""
    applied: bool
    """True if the weights were changed; False for a skipped update."""
    culprit: str | None
    """Name of the first parameter whose gradient was not finite; None for an applied update."""


class Player(ABC):
    """One network and its optimizer under a parallel strategy: one process, DDP or ZeRO.

    Args:
        name: `generator` or `discriminator`.
        module: the network without a wrapper, called while the other player is trained.
        forward_module: the module that is called while this player is trained: the network, or DDP around the network.
        clip: largest norm of the whole gradient; 0 for no clipping.
        layout: short name of the order in which gradients are summed over ranks; empty if there is only one order.
    """

    def __init__(
        self, name: str, module: nn.Module, forward_module: nn.Module, *, clip: float, layout: str = ""
    ) -> None:  # fmt: skip
        self.name = name
        self.module = module
        self.forward_module = forward_module
        self.clip = clip
        self.layout = layout
        self.parameters = dict(module.named_parameters())
        self._spectral = spectral_weights(module)
        self._shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.parameters.items()}

    # -- a turn ---------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Freezes the network for the turn of the other player, that is, while only the other network is trained."""
        self.module.requires_grad_(False)

    @abstractmethod
    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Returns a context for the forward passes of one micro-batch.

        Args:
            last: True for the last micro-batch of the update, whose backward pass reduces the gradients over all ranks.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to the gradients of the parameters."""

    @abstractmethod
    def update(self, *, lr: float, beta2: float) -> Update:
        """Clips the gradient, updates the weights if the gradient's norm is finite, and clears the gradients.

        Reading the norm is the only host synchronisation of an update.

        Args:
            lr: learning rate.
            beta2: decay of Adam's second moment.
        """

    # -- its tensors ----------------------------------------------------------------------------------------------

    @abstractmethod
    def weights(self) -> Iterator[dict[str, Tensor]]:
        """Yields the unsharded parameters by name, in parts, each valid until the next is requested. Collective."""

    @abstractmethod
    def moment_names(self) -> tuple[str, ...]:
        """Returns the names of the optimizer's moments of each parameter, sorted; an empty tuple before the first update.

        The names are sorted because every rank has to read the moments in the same order, and the order of the
        optimizer's state may differ between ranks after a checkpoint was loaded.
        """

    @abstractmethod
    def full_moment(self, parameter: str, key: str) -> Tensor:
        """Returns one moment (state of the optimizer) of one parameter, unsharded. Collective.

        Args:
            parameter: name of the parameter.
            key: name of the moment, one of `moment_names`.
        """

    @abstractmethod
    def load_full_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores weights, buffers and moments from tensors that `full_tensors` gave under any strategy. Collective.

        Raises:
            ValueError: names or shapes of the tensors differ from those of this network.
        """

    def table(self) -> dict[str, TensorFacts]:
        """Returns the shape and dtype of every tensor that `full_tensors` yields, by name, in the same order."""
        dtype = next(iter(self.parameters.values())).dtype
        found = {f"weights/{n}": TensorFacts(shape, dtype) for n, shape in self._shapes.items()}
        found |= {f"buffers/{n}": TensorFacts(tuple(b.shape), b.dtype) for n, b in self.module.named_buffers()}
        for name, shape in self._shapes.items():
            for key in self.moment_names():
                found[f"optimizer/{name}/{key}"] = (
                    TensorFacts((), torch.float32) if key == "step" else TensorFacts(shape, dtype)
                )
        return found

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the unsharded weights, buffers and moments by name, in the same order on every rank. Collective.

        A tensor may be the live one or a copy, and is valid until the next is requested, so that no more than one part
        of the network is ever gathered.
        """
        for part in self.weights():
            yield from ((f"weights/{name}", tensor) for name, tensor in part.items())
        yield from ((f"buffers/{name}", buffer) for name, buffer in self.module.named_buffers())
        for name in self.parameters:
            for key in self.moment_names():
                yield f"optimizer/{name}/{key}", self.full_moment(name, key)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the unsharded tensors that a checkpoint stores, by name."""
        return self.full_tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the state from tensors that the method `tensors` has yielded."""
        self.load_full_tensors(tensors)

    # -- for the strategies ---------------------------------------------------------------------------------------

    def _check_names(self, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Compares tensors with this network; returns the names of the moments among them.

        Raises:
            ValueError: a tensor is missing or unknown, or has another shape.
        """
        own = {name: facts for name, facts in self.table().items() if not name.startswith("optimizer/")}
        moments = {name for name in tensors if name.startswith("optimizer/")}
        missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys() - moments
        if missing or unknown:
            raise ValueError(f"{self.name}: tensors missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}")
        for name, facts in own.items():
            if tuple(tensors[name].shape) != facts.shape:
                raise ValueError(f"{self.name}: {name} is {tuple(tensors[name].shape)} and has to be {facts.shape}")
        keys = tuple(sorted({name.rsplit("/", 1)[1] for name in moments}))
        expected = {f"optimizer/{name}/{key}" for name in self.parameters for key in keys}
        if moments != expected:
            raise ValueError(f"{self.name}: moments of {sorted(moments ^ expected)[:5]} are missing or unknown")
        for name, shape in self._shapes.items():
            for key in keys:
                found = tuple(tensors[f"optimizer/{name}/{key}"].shape)
                if found != (() if key == "step" else shape):
                    raise ValueError(f"{self.name}: the moment {key} of {name} is {found} and has to be {shape}")
        return keys

    def _iterate_spectral(self) -> None:
        """Runs the power iteration of spectral normalisation by one step, after the weights were updated."""
        if self._spectral:
            for part in self.weights():
                for name in part.keys() & self._spectral.keys():
                    self._spectral[name].iterate(part[name])

    def _load_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        for name, buffer in self.module.named_buffers():
            buffer.copy_(tensors[f"buffers/{name}"])


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, beta2: float) -> None:
    """Sets the learning rate, and the decay of Adam's second moment, of an optimizer for its next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (group["betas"][0], beta2)


class TorchPlayer(Player):
    """A player (one network with its optimizer) on one process, or with DDP around the network.

    Args:
        optimizer: optimizer of the module's parameters, in the order of the parameters, as prepared by accelerate.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        forward_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        layout: str = "",
    ) -> None:
        super().__init__(name, module, forward_module, clip=clip, layout=layout)
        self.optimizer = optimizer

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        if not last and isinstance(self.forward_module, DistributedDataParallel):
            return self.forward_module.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, *, lr: float, beta2: float) -> Update:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            raise TrainingFailed(f"the {self.name}'s loss reaches none of its parameters")
        norm_tensor = torch.nn.utils.get_total_norm(gradients)
        norm = float(norm_tensor)
        applied = math.isfinite(norm)
        culprit = None
        if applied:
            if 0 < self.clip < norm:
                torch._foreach_mul_(gradients, self.clip / norm)
            set_rates(self.optimizer, lr=lr, beta2=beta2)
            self.optimizer.step()
            self._iterate_spectral()
        else:
            culprit = self._first_not_finite()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(self.name, norm, applied, culprit)

    def _first_not_finite(self) -> str:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"{self.name}/{name}"
        return f"{self.name} (every gradient is finite, the norm of all is not)"

    def weights(self) -> Iterator[dict[str, Tensor]]:
        yield {name: p.detach() for name, p in self.parameters.items()}

    def moment_names(self) -> tuple[str, ...]:
        state = self.optimizer.state.get(next(iter(self.parameters.values())), {})
        return tuple(sorted(key for key, value in state.items() if isinstance(value, Tensor)))

    def full_moment(self, parameter: str, key: str) -> Tensor:
        return self.optimizer.state[self.parameters[parameter]][key]

    @torch.no_grad()
    def load_full_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        keys = self._check_names(tensors)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weights/{name}"])
        self._load_buffers(tensors)
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            for key in keys:
                value = tensors[f"optimizer/{name}/{key}"]
                # A moment has the memory format of its parameter, as fused optimizers require.
                like = value.to(parameter.device) if key == "step" else parameter
                self.optimizer.state[parameter][key] = torch.empty_like(like).copy_(value)
