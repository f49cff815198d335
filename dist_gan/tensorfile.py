"""The only importer of safetensors: named tensors as bytes, and back. The format holds no code and no checksum."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


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
