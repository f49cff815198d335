"""Converts named tensors to bytes in the safetensors format, and back. The format holds no code and no checksum.

The safetensors library reads all files and writes small ones. A checkpoint's file is laid out by this module instead,
in one buffer that is allocated once: the header, then the numbers. The buffer that the tensors are copied into is thus
the buffer that is written to the disk, without a further copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dist_gan.records import Damaged, Record, parse
from dist_gan.types import TensorFacts, facts_of

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
"""Torch dtype for each name of a dtype in the safetensors format."""
HEADER_LIMIT = 2**24
"""Largest size of a file's header, in bytes."""
_MOST_AXES = 16
_ALIGN = 8


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Returns tensors as the bytes of one safetensors file."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    return bytes(save(plain))


def from_bytes(data: bytes, *, name: str) -> dict[str, Tensor]:
    """Returns the tensors in the bytes of a safetensors file, by their names.

    Raises:
        ValueError: the bytes are no safetensors file; `name` names the file in the message.
    """
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{name} is no safetensors file ({error})") from error


class TensorEntry(NamedTuple):
    """Entry of one tensor in the header of a file: shape, dtype, and position of the data."""

    facts: TensorFacts
    start: int
    """Position of the tensor's first byte, in bytes from the beginning of the file."""
    end: int
    """Position after the tensor's last byte, in bytes from the beginning of the file."""


def header_bytes(begin: bytes, *, size: int, name: str) -> int:
    """Returns the size of a file's header, in bytes, including the eight bytes in front that hold the header's length.

    Args:
        begin: the first eight bytes of the file, or more.
        size: size of the file, in bytes.
        name: name of the file, for errors.

    Raises:
        ValueError: there is no header, or its length exceeds the file or `HEADER_LIMIT`.
    """
    length = 8 + int.from_bytes(begin[:8], "little")
    if len(begin) < 8 or length > min(size, HEADER_LIMIT):
        raise ValueError(f"{name} is no safetensors file (its header does not fit its size)")
    return length


def read_header(head: bytes, *, size: int, name: str) -> dict[str, TensorEntry]:
    """Reads shape, dtype and position of each tensor from a file's header; the tensors have to fill the file exactly.

    Args:
        head: the header with the eight bytes in front, or more.
        size: size of the file, in bytes.
        name: name of the file, for errors.

    Raises:
        ValueError: the header is invalid, or its tensors do not fill the file exactly.
    """
    length = header_bytes(head, size=size, name=name)
    found: dict[str, TensorEntry] = {}
    try:
        record = Record(parse(head[8:length], place="header"), place="header")
        for tensor in set(record) - {"__metadata__"}:
            entry = record.record(tensor)
            facts, offsets = facts_in(entry), entry.wholes("data_offsets")
            if len(offsets) != 2 or offsets[1] - offsets[0] != facts.nbytes:
                raise entry.problem("data_offsets", f"a place of {facts.nbytes:,} bytes")
            found[tensor] = TensorEntry(facts, length + offsets[0], length + offsets[1])
    except Damaged as error:
        raise ValueError(f"{name} is no safetensors file ({error})") from error
    places = sorted((place.start, place.end) for place in found.values())
    if [*(start for start, _ in places), size] != [length, *(end for _, end in places)]:
        raise ValueError(f"{name} is no safetensors file (its header does not fit its size)")
    return found


def facts_in(entry: Record) -> TensorFacts:
    """Reads shape and dtype from an entry of a tensor file's header or of a checkpoint's manifest.

    Raises:
        Damaged: the shape or dtype is invalid.
    """
    shape, dtype = entry.wholes("shape"), entry.text("dtype")
    if dtype not in DTYPES:
        raise entry.problem("dtype", f"one of {', '.join(DTYPES)}")
    if len(shape) > _MOST_AXES:
        raise entry.problem("shape", f"of at most {_MOST_AXES} axes")
    return TensorFacts(tuple(shape), DTYPES[dtype])


class FileBuffer:
    """Holds a safetensors file in memory, which tensors are copied into.

    Args:
        table: shape and dtype of each tensor of the file, by name.
        pinned: whether the buffer is in pinned memory, into which a GPU copies without waiting.
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
        """Shape, dtype, and first and last byte position in the file, of each tensor."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Copies a tensor to its place in the file.

        The copy from a GPU runs in the background, in the order of the current CUDA stream.

        Raises:
            ValueError: the tensor has another shape or dtype than was announced for the file.
        """
        facts = self.table[name]
        found = facts_of(tensor)
        if found != facts:
            raise ValueError(
                f"{name} has shape {found.shape} and {found.dtype}; announced were {facts.shape} and {facts.dtype}"
            )
        start, end = self.places[name]["offsets"]
        place = self.data[start:end].view(facts.dtype).view(facts.shape)
        place.copy_(tensor.detach(), non_blocking=True)

    def bytes(self) -> memoryview:
        """Returns the whole file as a view of the buffer, without a copy."""
        return memoryview(self.data.numpy())  # type: ignore[arg-type]
