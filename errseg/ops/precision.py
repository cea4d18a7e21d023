"""How weights are composed: once, in float32 or better, outside autocast, then cast."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when already float32 or float64."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(function: F) -> F:
    """Run a function with autocast off, so that what it composes or counts keeps its own precision."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
