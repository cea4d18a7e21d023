"""`import errseg` is light, the folders beside it carry their import names, and wrong names are refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import errseg

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        absent = {"triton", "open_clip", "timm", "torchvision", "huggingface_hub", "accelerate"}
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import os
os.environ["PATH"] = ""
"""


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_imports_without_the_optional_half() -> None:
    done = run(
        BLOCKED
        + "import errseg, errseg.ops, errseg.testing, errseg.kernels, errseg.bench, errseg.segmenter\n"
        + "import errseg.cli, errseg.cli.info as info\n"
        + "assert 'missing' in info._version('no-such-distribution', None)\n"
        + "facts = info.collect()\n"
        + "assert 'does not import' in facts['versions']['open_clip_torch']\n"
        + "assert facts['compilers']['c++'].startswith('not found')\n"
        + "assert all(row['reference'] is None for row in facts['backends'].values())\n"
    )
    assert done.returncode == 0, done.stderr


def test_import_takes_under_half_a_second_beyond_torch() -> None:
    code = (
        "import time, torch\nstart = time.perf_counter()\nimport errseg\nerrseg.Segmenter, errseg.ops\n"
        "print(time.perf_counter() - start)"
    )
    # One quick import in three is proof; what other processes take away is not the import's.
    assert any(float(run(code).stdout) < 0.5 for _ in range(3))


def test_every_public_name_resolves() -> None:
    for name in errseg.__all__:
        assert getattr(errseg, name) is not None
    assert set(errseg.__all__) <= set(dir(errseg))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = errseg.no_such_name


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_folders_have_one_import_name(folder: str) -> None:
    assert importlib.import_module(f"errseg.{folder}").__name__ == f"errseg.{folder}"
    done = run(f"import {folder}")
    assert f"import errseg.{folder}" in done.stderr.splitlines()[-1]
