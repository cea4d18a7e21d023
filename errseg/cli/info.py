"""`errseg info`: what is installed, what this machine has, and which backends run here or why not."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

# Distribution name -> module whose import shows that it works (None: its metadata is enough).
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "torchvision": "torchvision",
    "open_clip_torch": "open_clip",
    "timm": "timm",
    "numpy": "numpy",
    "Pillow": "PIL",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "einops": "einops",
    "accelerate": None,
    "typer": None,
    "rich": None,
}

Backends = dict[str, dict[str, str | None]]
_TITLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what is installed, what this machine has, and which backends run here."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def collect() -> dict[str, Any]:
    """Return versions, devices, compilers and backends as JSON values; what is missing gives its reason."""
    import errseg
    from errseg import ops

    return {
        "versions": {"errseg": errseg.__version__, "python": platform.python_version()}
        | {name: _version(name, module) for name, module in PACKAGES.items()},
        "devices": {"cpu": _cpu(), "gpus": _gpus()},
        "compilers": {"c++": _compiler(os.environ.get("CXX", "c++")), "nvcc": _compiler("nvcc")},
        "backends": ops.backends(),
    }


def _version(distribution: str, module: str | None) -> str:
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"missing: pip install {distribution}"
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises is the answer
        reason = " ".join(str(error).split())[:200]
        hint = "; install torch and torchvision from the same index" if "torchvision::" in reason else ""
        return f"{version}, does not import: {type(error).__name__}: {reason}{hint}"
    return version


def _cpu() -> dict[str, Any]:
    import torch

    # torch.cpu.get_capabilities is younger than the oldest torch supported.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "name": _cpu_name() or known.get("cpu_name") or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16": [name for name in ("amx_bf16", "avx512_bf16", "bf16", "sme") if known.get(name)],
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = re.search(r"^model name\s*:\s*(.+)$", lines.read(), re.MULTILINE)
    except OSError:
        return platform.processor()
    return found[1].strip() if found else platform.processor()


def _gpus() -> list[dict[str, Any]] | str:
    """Every GPU that torch sees, or the reason why it sees none."""
    import torch

    if not torch.backends.cuda.is_built() and torch.version.hip is None:
        return "none: this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "none: torch finds no usable CUDA device"
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gb": round(properties.total_memory / 1e9, 1),
            }
        )
    return gpus


def _compiler(command: str) -> str:
    if shutil.which(command) is None:
        return "not found (optional: native backends are compiled with it)"
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"found, but does not run: {error}"
    release = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)  # nvcc's first line is its name only
    return release[1] if release else done.stdout.partition("\n")[0].strip()


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    for part in ("versions", "compilers"):
        console.print(_two_columns(part, list(facts[part].items())))
    console.print(_two_columns("devices", _device_rows(facts["devices"])))
    backends = facts["backends"]
    grid = Table("op", *_backend_names(backends), title="backends that run here", **_TITLE)
    for op, row in backends.items():
        grid.add_row(op, *(_verdict(row.get(name, "")) for name in _backend_names(backends)))
    console.print(grid)
    reasons = _reasons(backends)
    if reasons:
        console.print(_two_columns("why not", reasons))


def _two_columns(title: str, rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table

    grid = Table(title=title, show_header=False, **_TITLE)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, _styled(text))
    return grid


def _device_rows(devices: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, gpus = devices["cpu"], devices["gpus"]
    bf16 = f"bf16 units: {', '.join(cpu['bf16']) or 'none found'}"
    cores = f"{cpu['cores']} cores, torch uses {cpu['torch_threads']} threads"
    rows = [("cpu", f"{cpu['name']}, {cores}, {cpu['vectors']}, {bf16}")]
    if isinstance(gpus, str):
        return [*rows, ("gpu", gpus)]
    for index, gpu in enumerate(gpus):
        rows.append((f"cuda:{index}", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gb']} GB"))
    return rows


def _backend_names(backends: Backends) -> list[str]:
    return list(dict.fromkeys(name for row in backends.values() for name in row))


def _verdict(reason: str | None) -> str:
    if reason is None:
        return "[green]yes[/]"
    return "[yellow]interpreted[/]" if reason == "interpreted" else "-"


def _reasons(backends: Backends) -> list[tuple[str, str]]:
    """One row per backend and reason, naming the ops it holds for."""
    held: dict[tuple[str, str], list[str]] = {}
    for op, row in backends.items():
        for name, reason in row.items():
            if reason not in (None, "interpreted"):
                held.setdefault((name, str(reason)), []).append(op)
    return [
        (name, f"{reason} ({'every op' if len(ops) == len(backends) else ', '.join(ops)})")
        for (name, reason), ops in held.items()
    ]


def _styled(text: str) -> Text:
    from rich.text import Text

    styled = Text(text)
    styled.highlight_regex(r"(missing|not found|none|does not import|does not run|found, but)[^\n]*", "yellow")
    styled.highlight_regex(r"runs here", "green")
    return styled
