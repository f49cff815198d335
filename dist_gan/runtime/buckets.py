"""Final layout of DDP's gradient buckets before the first step, so that every step sums in the same order.

DDP sums gradients in buckets. DDP begins with one layout of the buckets, and after its first backward pass it makes
another layout once, in the order in which the gradients arrived (`Reducer::rebuild_buckets` in
torch/csrc/distributed/c10d/reducer.cpp). The order in which the numbers of three or more ranks are added depends on
their positions in a bucket: a resumed run, which begins with the first layout again, would differ from an uninterrupted
run. The passes of `lay_out` force the final layout before the first real gradient: they multiply each parameter by
zero, in the reverse of the network's parameter order, and do not call the network, so that they change no weight,
buffer or random state and use no image.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_PASSES = 3
"""Number of passes: DDP records the first, uses the new layout in the second, and logs this layout in the third."""


class BucketedNetwork(nn.Module):
    """Module inside DDP, which calls the network, or returns a zero that depends on all of the network's parameters.

    Args:
        network: generator or discriminator.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any, only_parameters: bool = False, **named: Any) -> Tensor:
        """Returns the network's output; with `only_parameters`, a zero that depends on every parameter."""
        if not only_parameters:
            return self.network(*inputs, **named)
        parameters = list(self.network.parameters())
        total = parameters[0].sum() * 0
        for parameter in parameters[1:]:
            total = total + parameter.sum() * 0
        return total


def lay_out(wrapped: DistributedDataParallel) -> str:
    """Brings DDP's gradient buckets into their final layout; returns a short name of the layout. Collective.

    The last parameter's gradient arrives first in these passes, as in most networks; in the resulting layout, the
    reduction of a step overlaps with its backward pass.

    Args:
        wrapped: DDP around a `BucketedNetwork`, before its first pass.
    """
    with torch.enable_grad():
        for _ in range(_PASSES):  # a keyword argument: on a GPU, DDP cannot be called without any argument
            wrapped(only_parameters=True).backward()
    for parameter in wrapped.parameters():
        parameter.grad = None
    facts = wrapped._get_ddp_logging_data()
    if not facts.get("has_rebuilt_buckets"):
        return "not laid out"
    sizes, places = facts["rebuilt_bucket_sizes"], facts["rebuilt_per_bucket_param_indices"]
    digest = hashlib.sha256(f"{sizes}/{places}/{facts['dtypes']}".encode()).hexdigest()[:16]
    return f"{len(sizes.split(','))} buckets, {digest}"
