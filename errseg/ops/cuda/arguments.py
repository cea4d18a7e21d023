"""What kernels on tensor cores take."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MAX_CHANNELS, MAX_HEAD_WIDTH = 256, 64  # as in csrc/common/heads.cuh
DTYPES = torch.bfloat16, torch.float16


def why_not(x: Tensor, others: Iterable[Tensor], num_heads: int) -> str | None:
    """Why kernels cannot take these dtypes, channels and heads."""
    channels = x.shape[-1]
    width = channels // num_heads
    for tensor in (x, *others):
        if x.dtype not in DTYPES or tensor.dtype != x.dtype:
            return f"all of bfloat16 or all of float16, got {tensor.dtype}"
    if channels % 16 or channels > MAX_CHANNELS:
        return f"channels in multiples of 16, up to {MAX_CHANNELS}, got {channels}"
    if width % 8 or width > MAX_HEAD_WIDTH:
        return f"heads of channels in multiples of 8, up to {MAX_HEAD_WIDTH}, got {width}"
    return None


def ready(tensor: Tensor) -> Tensor:
    """Contiguous and aligned to the widest access."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
