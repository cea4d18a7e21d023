"""The Triton backend of an op: its kernels are imported on the first call, Triton's presence is asked for before.

``errseg.kernels.<op>`` offers ``forward`` and, for a differentiable op, ``backward``, with the arguments that
:class:`errseg.ops.contract.Backend` describes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from errseg.ops.contract import INTERPRETED, Backend

MIN_CAPABILITY = (8, 0)  # bfloat16 and tf32 products
MAX_SIDE = 32767  # coordinates are exact in int32: (2 H + 1) h + h stays below 2**31
MAX_CHANNELS, MAX_HEAD_WIDTH = 256, 64  # a program holds its tokens, and one head of them, in registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def backend(op: str, *, can_run: Callable[..., str | None] = lambda *args: None, **options: Any) -> Backend:
    """The kernels of ``op``, with options of :class:`Backend`; ``can_run`` adds to the reasons of device and dtype."""

    def forward(*args: Any) -> Any:
        return _kernels(op).forward(*args)

    def backward(*args: Any) -> Any:
        return _kernels(op).backward(*args)

    def reason(*args: Any) -> str | None:
        return unsupported(*args) or can_run(*args)

    return Backend(forward=forward, backward=backward, available=available, can_run=reason, **options)


def available() -> str | None:
    """``None`` on an NVIDIA GPU, "interpreted" under ``TRITON_INTERPRET=1``, else why Triton cannot run here."""
    return _find_out()


# torch.compile takes the answer as a constant instead of tracing how it is found out. Setting what
# torch.compiler.assume_constant_result sets spares the import of the whole compiler.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(*args: Any) -> str | None:
    """Why kernels cannot take these tensors because of their device or dtype."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    device = "cpu" if available() == INTERPRETED else "cuda"
    for tensor in tensors:
        if tensor.device.type != device:
            return f"needs {device.upper()} tensors, got {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"no kernel for {tensor.dtype}"
    return None


def sides_fit(*sides: int) -> str | None:
    """Why the resampling kernels cannot take maps of these heights and widths."""
    largest = max(sides)
    return None if largest <= MAX_SIDE else f"maps of up to {MAX_SIDE} pixels a side, got {largest}"


def heads_fit(channels: int, num_heads: int = 0) -> str | None:
    """Why the kernels that own whole tokens cannot take these channels and, where there are any, heads."""
    if channels > MAX_CHANNELS:
        return f"up to {MAX_CHANNELS} channels, got {channels}"
    width = channels // num_heads if num_heads else 0
    return None if width <= MAX_HEAD_WIDTH else f"heads of up to {MAX_HEAD_WIDTH} channels, got {width}"


def interpreting() -> bool:
    """Whether kernels that are imported now will be interpreted."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # an import hook may refuse even the question
        return False


@functools.cache
def _find_out() -> str | None:
    if not _installed():
        return "Triton is not installed (it comes with torch on Linux)"
    if interpreting():
        return INTERPRETED
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"needs an NVIDIA GPU of capability 8.0 or newer, this one has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _kernels(op: str) -> ModuleType:
    if available() == INTERPRETED:
        from errseg.testing.interpreter import repair

        repair()
    return importlib.import_module(f"errseg.kernels.{op}")
