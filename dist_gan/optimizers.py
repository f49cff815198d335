"""Kinds of optimizers: each is one value that holds the class of its settings and the function that builds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import nn

from dist_gan.config.values import Decay, Knob, Ramp, Real, Section


class OptimizerSettings(Protocol):
    """What the settings of all optimizers have in common."""

    @property
    def kind(self) -> str:
        """Name of the optimizer."""
        ...

    @property
    def lr(self) -> float | Ramp:
        """Learning rate of the optimizer: a number, or a ramp over the images seen."""
        ...

    @property
    def beta2(self) -> float | Ramp:
        """Decay of the second moment; 0 for an optimizer that has none."""
        ...

    @property
    def clip(self) -> float:
        """Largest norm of the network's gradient over all parameters; a longer one is scaled down. 0 turns it off."""
        ...


class AdamSection(Section):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019)."""

    kind: Literal["adam", "adamw"] = "adam"
    """Optimizer: `adam` adds weight decay to the gradient, `adamw` subtracts it from the weights directly."""
    lr: Knob = 2e-4
    """Learning rate of the optimizer: a number, or a ramp over the images seen."""
    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.5
    """Decay rate of Adam's first moment, the moving average of the gradient."""
    beta2: Decay = 0.999
    """Decay rate of Adam's second moment, the moving average of the squared gradient."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """Constant that is added to the denominator of Adam's update, for numerical stability."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Coefficient of weight decay (L2 regularisation) on all parameters; 0 turns it off."""
    clip: Annotated[Real, Field(ge=0)] = 0.0
    """Largest norm of the network's gradient over all parameters; a longer one is scaled down. 0 turns it off."""


class SGDSection(Section):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    """Name of this optimizer: torch's stochastic gradient descent, `torch.optim.SGD`."""
    lr: Knob = 0.01
    """Learning rate of the optimizer: a number, or a ramp over the images seen."""
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """Momentum factor of the optimizer; 0 turns momentum off."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Coefficient of weight decay (L2 regularisation) on all parameters; 0 turns it off."""
    clip: Annotated[Real, Field(ge=0)] = 0.0
    """Largest norm of the network's gradient over all parameters; a longer one is scaled down. 0 turns it off."""

    @property
    def beta2(self) -> float:
        """Returns 0, since stochastic gradient descent has no second moment."""
        return 0.0


S = TypeVar("S", bound=OptimizerSettings)


@dataclass(frozen=True)
class Optimizer(Generic[S]):
    """One kind of optimizer. The training step sets learning rate and beta2 anew before each update."""

    settings: type[S]
    """Class of the sections `g_optim` and `d_optim`."""
    build: Callable[[list[nn.Parameter], S], torch.optim.Optimizer]
    """Function that builds torch's fused optimizer of the given parameters."""


def _adam(parameters: list[nn.Parameter], section: AdamSection) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, **_adam_settings(section))


def _adamw(parameters: list[nn.Parameter], section: AdamSection) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **_adam_settings(section))


def _adam_settings(section: AdamSection) -> dict[str, Any]:
    betas = (section.beta1, 0.999)
    return {"lr": 0.0, "betas": betas, "eps": section.eps, "weight_decay": section.weight_decay, "fused": True}


def _sgd(parameters: list[nn.Parameter], section: SGDSection) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=section.momentum, weight_decay=section.weight_decay, fused=True)


OPTIMIZERS: dict[str, Optimizer[Any]] = {
    "adam": Optimizer(AdamSection, build=_adam),
    "adamw": Optimizer(AdamSection, build=_adamw),
    "sgd": Optimizer(SGDSection, build=_sgd),
}
"""Every kind of optimizer by its name, which is the value of `g_optim.kind` and `d_optim.kind`."""


def build_optimizer(parameters: list[nn.Parameter], section: OptimizerSettings) -> torch.optim.Optimizer:
    """Builds torch's optimizer of some parameters; the player sets learning rate and beta2 at every update."""
    return OPTIMIZERS[section.kind].build(parameters, section)
