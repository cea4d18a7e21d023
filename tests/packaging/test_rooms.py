"""Every op has the same name in every room, and nothing in the repository belongs to one machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from errseg import ops

ROOT = Path(__file__).parents[2]
ROOMS = ("errseg/ops/{}.py", "errseg/ops/reference/{}.py", "tests/ops/test_{}.py")
# Absolute paths of somebody's machine, spelled so that this file does not contain one.
MACHINE_PATH = re.compile(rb"(?<![\w.~}/-])/(?:tm[p]|roo[t]|hom[e]|wor[k]|User[s]|mn[t])/\w")


@pytest.mark.parametrize("op", ops.OPS)
def test_op_has_all_its_rooms(op: str) -> None:
    missing = [room.format(op) for room in ROOMS if not (ROOT / room.format(op)).is_file()]
    assert not missing, f"{op} lacks {', '.join(missing)}"


def test_no_room_without_an_op() -> None:
    kernels = {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    sources = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests/ops").glob("test_*.py")}
    assert not (kernels | sources) - set(ops.OPS) - {"common"}
    assert not set(ops.OPS) - tests


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_one_machine() -> None:
    texts = [path for path in tracked_files() if path.suffix not in {".safetensors", ".png", ".jpg"}]
    assert texts
    named = [str(path.relative_to(ROOT)) for path in texts if MACHINE_PATH.search(path.read_bytes())]
    assert not named
