"""Distributed training of generative adversarial networks that knows when training fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_gan.door import train
    from dist_gan.export import load_generator

__version__ = "0.1.0"
__all__ = ["__version__", "load_generator", "train"]


def __getattr__(name: str) -> Any:
    """Imports `train` or `load_generator`, and with it torch, when it is first asked for."""
    if name == "train":
        from dist_gan.door import train

        return train
    if name == "load_generator":
        from dist_gan.export import load_generator

        return load_generator
    raise AttributeError(f"module 'dist_gan' has no attribute {name!r}")
