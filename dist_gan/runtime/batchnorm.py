"""Batch normalisation over the batch of all ranks, on any device, and twice differentiable.

torch's SyncBatchNorm needs GPUs and has no second derivative. `CrossRankBatchNorm` is written in differentiable
operations, so that the gradient of a gradient penalty passes through it. With several micro-batches a step, each
micro-batch is normalised by its own mean and variance over all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks, differentiable any number of times: the gradient is summed over all ranks, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _SumOverRanks.apply(gradients[0])


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    return _SumOverRanks.apply(tensor) / dist.get_world_size()


class CrossRankBatchNorm(_BatchNorm):
    """Batch normalisation (`nn.BatchNorm1d`, `2d` or `3d`) by the mean and variance of all ranks' samples together.

    Every rank has to pass the same number of samples.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation of {input.dim()} dimensions; two at least are needed")

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(features)
        places = [d for d in range(features.dim()) if d != 1]
        shape = [1, -1] + [1] * (features.dim() - 2)
        wide = features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
        mean = _mean_over_ranks(wide.mean(places))
        centred = wide - mean.view(shape)
        variance = _mean_over_ranks(centred.square().mean(places))
        self._remember(
            mean.detach(), variance.detach(), samples=dist.get_world_size() * features.numel() // features.shape[1]
        )
        normed = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed.to(features.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, *, samples: int) -> None:
        """Updates the running mean and variance as torch does, with the unbiased estimate of the variance.

        Args:
            mean: mean of each channel over all ranks, C.
            variance: biased variance of each channel over all ranks, C.
            samples: number of values per channel on all ranks together.
        """
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype) * (samples / max(1, samples - 1)), weight)


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """Replaces every batch normalisation inside a module by one over all ranks; returns the module.

    Parameters and buffers are those of the replaced layers.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, CrossRankBatchNorm):
            joined = CrossRankBatchNorm(
                child.num_features,
                eps=child.eps,
                momentum=child.momentum,
                affine=child.affine,
                track_running_stats=child.track_running_stats,
                device=child.running_mean.device if child.running_mean is not None else None,
                dtype=child.running_mean.dtype if child.running_mean is not None else None,
            )
            joined.weight, joined.bias = child.weight, child.bias
            joined._buffers.update(child._buffers)
            joined.train(child.training)
            setattr(module, name, joined)
        else:
            synchronise_batchnorm(child)
    return module
