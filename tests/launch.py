"""Programs under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(*program: object, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a program, or `-m` and a module, with its arguments, as so many processes of one thread."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, *map(str, program)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a program that failed said on stderr beside torchrun's own report: the only line, and no traceback."""
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr, done.stderr  # of the process; torchrun's own is 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.count("Traceback") == done.stderr.count("ChildFailedError: ") == 1, done.stderr  # torchrun's own
    return lines[0]
