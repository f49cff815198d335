"""DDP's buckets, laid out once before the first step, so that every step of every start sums in one order.

DDP sums gradients in buckets. It begins with one layout, and after its first backward pass makes another, in the order
in which the gradients arrived (`Reducer::rebuild_buckets` in torch/csrc/distributed/c10d/reducer.cpp); it does so once.
The order in which the numbers of three or more ranks are added depends on their places in a bucket: a run that starts
again, with the first layout again, would differ from one that was never interrupted. The passes made here end that
before there is anything to add: each parameter takes part times zero, in the reverse of the order in which the network
holds them, and the network itself is not called, so that no weight, buffer, random number or image is touched.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_PASSES = 3
"""The first is recorded, the second begins with the new layout, the third brings it into DDP's description of itself."""


class Bucketed(nn.Module):
    """A network as DDP holds it, which can also be passed without being called.

    Args:
        network: what is trained.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any, only_parameters: bool = False, **named: Any) -> Tensor:
        """The network's output; or, with `only_parameters`, zero as a function of every parameter."""
        if not only_parameters:
            return self.network(*inputs, **named)
        parameters = list(self.network.parameters())
        total = parameters[0].sum() * 0
        for parameter in parameters[1:]:
            total = total + parameter.sum() * 0
        return total


def lay_out(wrapped: DistributedDataParallel) -> str:
    """Brings DDP's buckets into their final layout; returns a short name of it. Collective.

    The gradient of the last parameter arrives first, as in most networks, so that reduction and backward pass overlap.

    Args:
        wrapped: DDP around a `Bucketed` network, before its first pass.
    """
    with torch.enable_grad():
        for _ in range(_PASSES):  # by name: on a GPU, DDP cannot be called without any argument
            wrapped(only_parameters=True).backward()
    for parameter in wrapped.parameters():
        parameter.grad = None
    facts = wrapped._get_ddp_logging_data()
    if not facts.get("has_rebuilt_buckets"):
        return "not laid out"
    sizes, places = facts["rebuilt_bucket_sizes"], facts["rebuilt_per_bucket_param_indices"]
    digest = hashlib.sha256(f"{sizes}/{places}/{facts['dtypes']}".encode()).hexdigest()[:16]
    return f"{len(sizes.split(','))} buckets, {digest}"
