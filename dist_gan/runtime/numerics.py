"""Settings of torch for precision and determinism of arithmetic, which are made before the device is first used."""

from __future__ import annotations

import os

import torch

from dist_gan.config import RuntimeSection


def set_numerics(section: RuntimeSection) -> None:
    """Sets the precision of fp32 arithmetic, and selects deterministic kernels if `runtime.deterministic` is set.

    By default torch uses TF32 (10 bits of mantissa) for convolutions and not for matrix products; here both follow
    `runtime.tf32`. Torch's older `allow_tf32` is set, not the newer `fp32_precision`, because reading `allow_tf32` raises
    an error once `fp32_precision` is set.
    """
    torch.backends.cudnn.allow_tf32 = section.tf32
    torch.backends.cuda.matmul.allow_tf32 = section.tf32
    if section.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is initialised
        torch.use_deterministic_algorithms(True)
        # By default, deterministic mode fills each `torch.empty` with NaN, which costs a kernel; this program never reads
        # memory before writing it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
