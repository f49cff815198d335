"""Random numbers by address: each is a function of (seed, purpose, draw, slot) and of nothing else.

No generator is advanced and no state is kept, so that the number which an image gets does not depend on how many
processes share the batch, on what was drawn before, or on whether the run was interrupted. The function is
Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011), written in 64-bit
integer operations of torch, hence the same bits on every device.

Address: the key is a hash of seed and purpose; the counter holds the place inside the sample (32 bits), the slot
(32 bits) and the draw (64 bits), so no two addresses share a counter.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter_4N: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: four words of 32 bits for each counter.

    Args:
        counter_4N: int64 holding words in [0, 2^32), shape (4, N).
        key: two words of 32 bits.

    Returns:
        int64 words in [0, 2^32), shape (4, N), on the counter's device.
    """
    multipliers, round_keys = _constants(key, counter_4N.device)
    even, odd = counter_4N[0::2], counter_4N[1::2]
    for round_key in round_keys:
        product = even * multipliers
        high = product.bitwise_right_shift(32).bitwise_and_(_LOW).flip(0)
        even, odd = high.bitwise_xor_(odd).bitwise_xor_(round_key), product.bitwise_and_(_LOW).flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


@lru_cache(maxsize=256)
def _constants(key: tuple[int, int], device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the multipliers and each round's key on `device`, where they are kept, since copying them each time would
    wait.
    """
    rounds = [[(key[i] + r * _WEYL[i]) & _LOW for i in (0, 1)] for r in range(_ROUNDS)]
    keys = torch.tensor(rounds, device=device).unsqueeze(2)
    return torch.tensor(_MULTIPLIERS, device=device).unsqueeze(1), tuple(keys.unbind(0))


@lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


class Draws:
    """Random numbers of a run, each computed from seed, purpose, draw and slot.

    Every method takes a `purpose` (what the numbers are for), the `draw` (number of the global batch) and `slots`
    (places in that batch, int64, B) and returns one row a slot.
    """

    def __init__(self, seed: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.seed = seed
        self.device = torch.device(device)
        self.dtype = dtype

    def words(self, purpose: str, *, draw: int, slots: Tensor, count: int) -> Tensor:
        """Returns uniform integers in [0, 2^32), int64, shape (B, count)."""
        blocks = -(-count // 4)
        slots = slots.to(self.device, non_blocking=True)
        counter = torch.empty(4, len(slots), blocks, dtype=torch.int64, device=self.device)
        counter[0] = torch.arange(blocks, device=self.device)
        counter[1] = slots.unsqueeze(1)
        counter[2] = draw & _LOW
        counter[3] = draw >> 32
        words = philox(counter.view(4, -1), _key(self.seed, purpose)).view(4, len(slots), blocks)
        return words.permute(1, 2, 0).reshape(len(slots), 4 * blocks)[:, :count]

    def uniform(self, purpose: str, *, draw: int, slots: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Returns uniform numbers in (0, 1), shape (B, *shape)."""
        words = self.words(purpose, draw=draw, slots=slots, count=math.prod(shape))
        unit = words.to(torch.float64).add_(0.5).mul_(2.0**-32).to(self.dtype)
        below_one = 1.0 - torch.finfo(self.dtype).eps / 2  # what the largest words round past in float32
        return unit.clamp_max_(below_one).view(len(slots), *shape)

    def normal(self, purpose: str, *, draw: int, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns standard normal numbers, shape (B, *shape), by Box and Muller (1958) in float64."""
        count = math.prod(shape)
        pairs = -(-count // 2)
        unit = self.words(purpose, draw=draw, slots=slots, count=2 * pairs).to(torch.float64)
        unit = unit.add_(0.5).mul_(2.0**-32)
        radius = unit[:, :pairs].log().mul_(-2.0).sqrt_()
        angle = unit[:, pairs:].mul_(2.0 * math.pi)
        normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]
        return normal.to(self.dtype).reshape(len(slots), *shape)

    def integers(self, purpose: str, *, draw: int, slots: Tensor, below: int) -> Tensor:
        """Returns integers in [0, below), int64, B; the bias of the scaling is below 2^-32 times `below`."""
        words = self.words(purpose, draw=draw, slots=slots, count=1)[:, 0]
        return (words * below).bitwise_right_shift(32)

    def seed_for(self, purpose: str, *, draw: int, rank: int) -> int:
        """Returns a 63-bit seed for a generator that keeps a state, such as torch's generator behind dropout."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}/{draw}/{rank}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1
