"""The safetensors format: named tensors as bytes, and back. It holds no code and no checksum.

Reading, and writing of small files, is the library's. A checkpoint's file is laid out here instead, into one buffer
that is allocated once: header, then the numbers, so that what was staged is what is written, without another copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dist_gan.types import TensorFacts

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGN = 8


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """One safetensors file."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    return bytes(save(plain))


def from_bytes(data: bytes, *, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is none; `name` says which file.
    """
    try:
        return dict(load(data))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{name} is no safetensors file ({error})") from error


def check_head(head: bytes, *, size: int, name: str) -> None:
    """Whether the first bytes of a file announce tensors that fill it exactly.

    Raises:
        ValueError: they do not; `name` says which file.
    """
    length = int.from_bytes(head[:8], "little")
    try:
        entries = json.loads(head[8 : 8 + length]) if 8 + length <= min(size, len(head)) else None
        ends = [e["data_offsets"][1] for key, e in entries.items() if key != "__metadata__"] if entries else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no safetensors file ({error})") from error
    if entries is None or 8 + length + max(ends, default=0) != size:
        raise ValueError(f"{name} is no safetensors file (its header does not fit its size)")


class FileBuffer:
    """A safetensors file in memory that tensors are copied into.

    Args:
        table: what the file is to hold.
        pinned: whether a GPU can copy into it without waiting.
    """

    def __init__(self, table: Mapping[str, TensorFacts], *, pinned: bool) -> None:
        self.table = dict(table)
        # Large types first, so that every tensor lies at a multiple of its own width.
        names = sorted(table, key=lambda n: (-table[n].dtype.itemsize, n))
        entries: dict[str, Any] = {}
        at = 0
        for name in names:
            facts = table[name]
            entries[name] = {
                "dtype": _DTYPES[facts.dtype], "shape": list(facts.shape), "data_offsets": [at, at + facts.nbytes]
            }  # fmt: skip
            at += facts.nbytes
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGN)
        begin = 8 + len(header)
        self.data = torch.empty(begin + at, dtype=torch.uint8, pin_memory=pinned)
        self.data[:begin] = torch.frombuffer(bytearray(len(header).to_bytes(8, "little") + header), dtype=torch.uint8)
        self.places = {
            name: {"shape": e["shape"], "dtype": e["dtype"], "offsets": [begin + o for o in e["data_offsets"]]}
            for name, e in entries.items()
        }
        """Shape, dtype and place in the file of each tensor."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Copies a tensor to its place; from a GPU in the background, in the order of its stream."""
        facts = self.table[name]
        assert tuple(tensor.shape) == facts.shape, (name, tensor.shape, facts)
        assert tensor.dtype == facts.dtype, (name, tensor.dtype, facts)
        start, end = self.places[name]["offsets"]
        place = self.data[start:end].view(facts.dtype).view(facts.shape)
        place.copy_(tensor.detach(), non_blocking=True)

    def bytes(self) -> memoryview:
        """The whole file, without a copy."""
        return memoryview(self.data.numpy())  # type: ignore[arg-type]
