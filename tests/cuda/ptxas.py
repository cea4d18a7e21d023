"""What ptxas says about every CUDA kernel; ``python -m tests.cuda.ptxas`` prints the table. Needs nvcc, no GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from errseg.ops import native_build

INSTANCES = Path(__file__).parent / "drivers/instances.cu"


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    stack: int  # bytes per thread
    spill_stores: int  # bytes
    spill_loads: int
    static_shared: int  # bytes per block; dynamic shared memory comes on top


def compile_kernels(folder: Path) -> list[Usage]:
    """Usage of all kernels on all architectures; kept in ``folder`` for as long as no source changes.

    Raises:
        native_build.Unavailable: no nvcc.
    """
    home = native_build.cuda_home()
    content = INSTANCES.read_bytes() + Path(__file__).read_bytes() + native_build.nvcc_version(home).encode()
    kept = folder / f"ptxas-{sha256(native_build.source_hash('cuda').encode() + content).hexdigest()[:20]}.json"
    if kept.is_file():
        return [Usage(**row) for row in json.loads(kept.read_text())]
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(str(home / "bin/nvcc"), "-std=c++20", "-Xptxas=-v", "--threads=0", *native_build.NVCC_FLAGS),
            *native_build.gencode(native_build.ARCHS, home),
            *(f"-I{native_build.source_root()}", "-c", str(INSTANCES), "-o", f"{scratch}/instances.o"),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout)
    rows = parse(done.stdout)
    kept.write_text(json.dumps([asdict(row) for row in rows]))
    return rows


def parse(printed: str) -> list[Usage]:
    """The rows of ``ptxas -v``."""
    rows = []
    for entry in printed.split("Compiling entry function ")[1:]:
        name, arch = re.findall(r"'([^']+)'", entry)[:2]
        registers, stack, stores, loads = (
            int(re.search(pattern, entry)[1])  # type: ignore[index]
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
            )
        )
        shared = re.search(r"(\d+) bytes smem", entry)
        rows.append(Usage(demangle(name), arch, registers, stack, stores, loads, int(shared[1]) if shared else 0))
    return sorted(rows, key=lambda row: (row.kernel, int(row.arch.removeprefix("sm_"))))


def demangle(name: str) -> str:
    """``class_votes_kernel<Split<__nv_bfloat16, 3>>`` for the linker's name."""
    if shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    rooms = "|".join(path.parent.name for path in native_build.sources("cuda"))
    text = re.sub(rf"\(int\)|\berrseg::|\b(?:{rooms})::", "", text)
    found = re.search(r"\w+_kernel(?:<.*?>+(?=\())?", text.replace(" >", ">"))
    return found[0] if found else name


def table(rows: list[Usage]) -> str:
    """One line per kernel and architecture."""
    lines = [f"{'kernel':<52}{'arch':>7}{'registers':>11}{'stack':>7}{'spills':>8}{'static shared':>15}"]
    lines += [
        f"{row.kernel:<52}{row.arch:>7}{row.registers:>11}{row.stack:>7}"
        f"{row.spill_stores + row.spill_loads:>8}{row.static_shared:>15}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(table(compile_kernels(Path(folder))) + "\n")
