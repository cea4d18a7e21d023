"""kill -9 at random moments, 20 times or ERRSEG_KILLS, loses nothing before the last checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_trainings_end_with_the_same_weights() -> None:
    kills = os.environ.get("ERRSEG_KILLS", "20")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill.py")), "--kills", kills, "--seed", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 + 30 * int(kills),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{kills} kills, ")
