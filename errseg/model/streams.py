"""Two branches of a network side by side while it is captured into a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def alongside(device: torch.device, work: Callable[[], T]) -> tuple[T, torch.cuda.Stream | None]:
    """Launch ``work`` so that it may run beside what is launched next; :func:`join` before its result is used.

    It does so only while a CUDA graph is captured, where the memory of both branches outlives every replay. Elsewhere
    everything runs in its order, and there is nothing to wait for.
    """
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return work(), None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        return work(), side


def join(branch: torch.cuda.Stream | None) -> None:
    """What is launched next waits for the branch."""
    if branch is not None:
        torch.cuda.current_stream(branch.device).wait_stream(branch)
