"""The count of executed cases per op and backend, and poisoned memory, tried on a small test tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

EXECUTED = """
import pytest, torch

@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_runs(size, backend):
    assert torch.empty(size).isnan().all()
    assert torch.ones(size).new_empty(size, dtype=torch.int32).eq(2**31 - 1).all()
"""
SKIPPED = """
import pytest

@pytest.mark.parametrize("backend", ["reference"])
def test_skips(backend):
    pytest.skip("never runs")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    ops = tmp_path / "tests" / "ops"
    ops.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", ops.parent)
    (ops / "test_class_votes.py").write_text(EXECUTED)
    (ops / "test_select_classes.py").write_text(SKIPPED)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    return tmp_path


def run(tree: Path, *args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | {"PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_backend_without_executed_cases_fails_the_run(tree: Path) -> None:
    code, text = run(tree, "tests", "-n", "1")  # counted across processes too
    assert code == 1
    assert "FAILED: no test executed select_classes on reference, which can run here" in text
    assert "class_votes on reference" not in text
    rows = [line.split() for line in text.splitlines() if line.startswith("class_votes ")]
    assert rows == [["class_votes", "3", "-", "-", "-"]]


def test_a_selection_is_only_counted(tree: Path) -> None:
    code, text = run(tree, "-k", "runs")
    assert code == 0
    assert "no test executed" not in text
    assert "class_votes " in text
