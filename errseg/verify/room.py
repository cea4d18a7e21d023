"""Where a comparison has its place: on which device, and within how much memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def elsewhere(backend: str, device: torch.device) -> str | None:
    """Why an available backend has nothing to do with tensors of this device."""
    home = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(backend, device.type)
    return None if home == device.type else f"not for tensors on {device.type}"


def free_gigabytes(device: torch.device) -> float:
    """Memory that a run may use now; without a way to know, 4 GB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024 / 1e9
    return 4.0
