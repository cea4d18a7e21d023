"""Compiles every shipped Triton configuration without a GPU and reads what the compiler made of it.

``python -m errseg.testing.aot [80 90 100]`` prints the table and fails where registers spill. The compiler runs in a
subprocess of its own, because kernels that were imported under ``TRITON_INTERPRET=1`` cannot be compiled; its answers
are kept by content of the sources, so that the next run is quick.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
EXACT_ARCH = 90  # where float64 is compiled: it is there for exactness, and one architecture shows that it compiles
# Tensor-core instructions in PTX, and what the manuals call them.
MATRIX_INSTRUCTIONS = {
    "tcgen05": r"\btcgen05\.mma\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "mma.sync": r"\bmma\.sync\.(?!.*\.f64)",
    "mma.sync f64": r"\bmma\.sync\..*\.f64",
}


@dataclass(frozen=True)
class Compiled:
    """What one configuration takes on one architecture."""

    op: str
    config: str
    arch: int  # 90 is sm_90
    registers: int  # per thread
    stack: int  # bytes per thread; spilled registers lie there
    shared: int  # bytes per program
    warps: int
    matrix: str  # kind of tensor-core instruction, "-" for none
    matrix_count: int

    @property
    def spilled(self) -> bool:
        """Whether registers went to memory, which a program does not use otherwise."""
        return self.stack > 0


def check(archs: Sequence[int] = ARCHS) -> list[Compiled]:
    """Every configuration of every op on every architecture; minutes the first time, then from the cache.

    Raises:
        RuntimeError: a kernel does not compile; the text is the compiler's.
    """
    from filelock import FileLock

    from errseg.ops.native import cache_folder

    folder = cache_folder() / "aot"
    folder.mkdir(parents=True, exist_ok=True)
    files = {(arch, op): folder / f"{op}-{arch}-{_key(op)}.json" for arch in archs for op in kernel_ops()}
    with FileLock(folder / "lock"), ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # once, for all processes here
        missing = {job: file for job, file in files.items() if not file.is_file()}
        for pile in [pool.submit(_compile_in_subprocess, arch, ops, missing) for arch, ops in _piles(missing)]:
            pile.result()
    return [Compiled(**row) for file in files.values() for row in json.loads(file.read_text())]


def table(rows: Sequence[Compiled]) -> str:
    """The rows as aligned text."""
    lines: list[tuple[str, ...]] = [
        ("op", "configuration", "arch", "registers", "stack", "shared", "warps", "tensor cores")
    ]
    for row in rows:
        matrix = f"{row.matrix_count} {row.matrix}" if row.matrix_count else "-"
        numbers = row.registers, row.stack, row.shared, row.warps
        lines.append((row.op, row.config, f"sm_{row.arch}", *map(str, numbers), matrix))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def kernel_ops() -> list[str]:
    """The ops that have Triton kernels."""
    return sorted(path.stem for path in _kernel_folder().glob("[!_]*.py") if path.stem != "common")


def _kernel_folder() -> Path:
    package = importlib.import_module("errseg.kernels")
    assert package.__file__ is not None
    return Path(package.__file__).parent


def _piles(jobs: Iterable[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    """Jobs for a subprocess each: an architecture and about half of its ops, since starting one takes seconds too."""
    ops: dict[int, list[str]] = {}
    for arch, op in jobs:
        ops.setdefault(arch, []).append(op)
    return [(arch, half) for arch, some in ops.items() for half in (some[::2], some[1::2]) if half]


def _key(op: str) -> str:
    from importlib.metadata import version

    folder = _kernel_folder()
    sources = [folder / f"{op}.py", *sorted(folder.glob(f"_{op}*.py")), folder / "common.py", Path(__file__)]
    parts = [version("triton").encode(), *(path.read_bytes() for path in sources)]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:20]


def _compile_in_subprocess(arch: int, ops: Sequence[str], files: Mapping[tuple[int, str], Path]) -> None:
    """Compile and write the rows of each op to its file."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        code = f"from errseg.testing import aot; aot._compile_all({arch}, {list(ops)!r})"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"Triton does not compile for sm_{arch}:\n{done.stderr[-4000:]}")
    for op, rows in json.loads(done.stdout.splitlines()[-1]).items():
        partial = files[arch, op].with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(rows))
        os.replace(partial, files[arch, op])


def _compile_all(arch: int, ops: Sequence[str]) -> None:
    """In the subprocess: compile and print the rows as one line of JSON."""
    _pretend_gpu(arch)
    rows = {}
    for op in ops:
        configs = importlib.import_module(f"errseg.kernels.{op}").CONFIGS
        rows[op] = [
            asdict(_compile(op, label.replace("torch.", ""), arch, config))
            for label, config in configs.items()
            if arch == EXACT_ARCH or "float64" not in label
        ]
    sys.stdout.write(json.dumps(rows) + "\n")


def _pretend_gpu(arch: int) -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Pretended:
        """As much of a driver as compiling asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Pretended())


def _compile(op: str, label: str, arch: int, config: Any) -> Compiled:
    kernel = config.kernel.warmup(*config.arguments, grid=(1,), **config.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    registers, stack = (int(_find(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    counts = {kind: len(re.findall(name, kernel.asm["ptx"])) for kind, name in MATRIX_INSTRUCTIONS.items()}
    matrix = max(counts, key=lambda kind: counts[kind])
    return Compiled(
        op,
        label,
        arch,
        registers,
        stack,
        kernel.metadata.shared,
        config.num_warps,
        matrix if counts[matrix] else "-",
        counts[matrix],
    )


def _tool(name: str, *arguments: str) -> str:
    """Run one of NVIDIA's binary tools, which come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(path) if path.is_file() else name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no {pattern}: {text[:500]}")
    return found[1]


def main(arguments: Sequence[str]) -> int:
    """Print the table; 1 when a configuration spills."""
    rows = check([int(a) for a in arguments] or ARCHS)
    sys.stdout.write(table(rows) + "\n")
    return int(any(row.spilled for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
