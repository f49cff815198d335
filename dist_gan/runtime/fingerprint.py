"""Fingerprints: 64-bit checksums of tensors, computed in one pass over the bytes on the tensor's own device."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS_AT_ONCE = 2**22
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 divided by the golden ratio, as a signed number; multiples of it at neighbouring positions differ in most bits."""


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Returns 64 bits that change whenever a single 8-byte word of the tensor does, as int64 on the tensor's device.

    The result is the sum, modulo 2^64, of every word times an odd number that depends on the word's position. An odd
    factor has an inverse modulo 2^64, so every change of one word changes the result; the order of the sum does not
    matter for integers. The fingerprint detects accidents, not deliberate changes.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    odd = flat.numel() % 8
    if odd:
        flat = torch.cat([flat, flat.new_zeros(8 - odd)])
    words = flat.view(torch.int64) if flat.storage_offset() % 8 == 0 else flat.clone().view(torch.int64)
    # `torch.tensor` would copy the number to the device synchronously.
    total = torch.full((), tensor.numel(), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        part = words[start : start + _WORDS_AT_ONCE]
        places = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        factors = ((places + 1) * _GOLDEN) | 1
        total = total + (part * factors).sum()
    return total


class Fingerprints:
    """Fingerprints (checksums) of many tensors by name, computed one after another without waiting for the device.

    Args:
        enabled: False to compute no fingerprints, in a launch of one process.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._names: list[str] = []
        self._prints: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Computes the fingerprint of a tensor's present content, and keeps it under `name`."""
        if self._enabled:
            self._names.append(name)
            self._prints.append(fingerprint(tensor))

    def result(self) -> dict[str, int]:
        """Returns all fingerprints by name, once the devices have computed them."""
        by_device: dict[torch.device, list[int]] = {}
        for index, value in enumerate(self._prints):
            by_device.setdefault(value.device, []).append(index)
        numbers = dict.fromkeys(self._names, 0)
        for indices in by_device.values():
            values = torch.stack([self._prints[i] for i in indices]).tolist()  # one host synchronisation per device
            numbers |= {self._names[i]: value for i, value in zip(indices, values, strict=True)}
        return numbers
