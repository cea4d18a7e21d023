"""The machine card: what a number was measured on. No host names, no paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import errseg
from errseg.bench.clock import cpu_cache_bytes

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "numpy", "einops", "open_clip_torch", "timm")
VARIABLES = ("OMP_NUM_THREADS", "ERRSEG_BACKEND", "ERRSEG_BUILD", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def machine_card(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit, threads and flags as JSON values; `run` identifies this process."""
    now = datetime.datetime.now(datetime.timezone.utc)
    card = {
        "run": f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
        "date": now.isoformat(timespec="seconds"),
        "machine": machine_name(device),
        "device": device.type,
        "cpu": _cpu(),
        "versions": _versions(),
        "git": git_state(),
        "flags": {
            "matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    return card | ({"gpu": _gpu(device)} if device.type == "cuda" else {})


def machine_name(device: torch.device) -> str:
    """A name for folders: the GPU's, or the CPU's with its number of cores."""
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device).name
    else:
        name = f"{_cpu_name()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu() -> dict[str, Any]:
    return {
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": cpu_cache_bytes(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_cache_bytes": properties.L2_cache_size,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"errseg": errseg.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}


def git_state() -> dict[str, Any]:
    """Commit and whether the checkout differs from it; both None outside a checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        return {"commit": None, "dirty": None}
    commit = _first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results") if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status.strip())}


def _first_line(*command: str) -> str | None:
    output = _output(*command)
    return output.splitlines()[0].strip() if output and output.strip() else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def results_folder(device: torch.device) -> Path:
    """`bench/results/<date>-<machine>` in a checkout, `errseg-bench/<date>-<machine>` elsewhere."""
    in_checkout = (ROOT / "pyproject.toml").is_file() and ROOT.name != "errseg"
    parent = ROOT / "bench" / "results" if in_checkout else Path("errseg-bench")
    return parent / f"{datetime.date.today():%Y-%m-%d}-{machine_name(device)}"
