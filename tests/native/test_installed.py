"""A wheel with a compiled library, and one that compiles its own sources, with two processes at it at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from errseg.ops import native_build

ROOT = Path(__file__).parents[2]
REPORT = """
import torch
from errseg import ops
from errseg.ops import native
votes = ops.class_votes(torch.ones(1, 2, 3, 3), torch.eye(2), backend="cpu")
print(votes.tolist(), native.library("cpu").name, native.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this repository, with one op's native sources to save time, built with ERRSEG_BUILD=cpu."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    skipped = [path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()]
    skipped = [name for name in skipped if name not in ("common", "class_votes")]
    for name in ("errseg", "kernels", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_native_*"))
    shutil.copytree(ROOT / "tests" / "golden", source / "tests" / "golden")
    shutil.copytree(ROOT / "csrc", source / "csrc", ignore=shutil.ignore_patterns(*skipped))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run(command, cwd=out, env=environment(out, ERRSEG_BUILD="cpu"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("errseg-*.whl"))


def environment(cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("ERRSEG_BUILD", "PYTHONPATH")}
    return {**kept, "ERRSEG_CACHE": str(cache), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return tmp_path / "site"


def start(site: Path, cache: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REPORT],
        cwd=site,
        env=environment(cache, PYTHONPATH=str(site), **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_the_installation_compiled_is_used(wheel: Path, site: Path, tmp_path: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    out, err = start(site, tmp_path / "cache", ERRSEG_BUILD="0").communicate()
    assert err == ""
    votes, name, file = out.replace("]] ", "]]|").replace(".so ", ".so|").strip().split("|")
    assert votes == "[[900, 90]]" and name.startswith("_native_cpu_") and Path(file).is_relative_to(site)
    assert not (tmp_path / "cache").exists()


def test_two_processes_compile_the_installed_sources_once(site: Path, tmp_path: Path) -> None:
    # A library of other sources than these is passed over.
    header = site / "errseg" / "csrc" / "common" / "simd.h"
    header.write_bytes(header.read_bytes() + b"// changed\n")
    cache = tmp_path / "cache"
    done = [process.communicate() for process in [start(site, cache), start(site, cache)]]
    libraries = list(cache.glob("*.so"))
    assert len(libraries) == 1 and not list(cache.glob(".build-*")), done
    assert [out.split()[:3] for out, _ in done] == [["[[900,", "90]]", libraries[0].name]] * 2
    assert sorted(err for _, err in done) == ["", f"errseg: compiling the cpu kernels, once, into {cache}\n"]


def test_an_installation_that_cannot_compile_says_why(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    for more, reason in (
        ({"ERRSEG_BUILD": "cpu", "CXX": "no-such-c++"}, "ERRSEG_BUILD=cpu: no C++ compiler (no-such-c++ not found)"),
        ({"ERRSEG_BUILD": "all"}, "ERRSEG_BUILD=all: expected auto, 0, cpu, cuda, got 'all' in ERRSEG_BUILD"),
    ):
        done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path, **more), capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(reason) and done.stderr.count("\n") == 1, done.stderr


def test_sources_are_those_of_the_checkout() -> None:
    assert native_build.source_root() == ROOT / "csrc"
    names = [path.name for path in native_build.sources("cpu")]
    assert "class_votes_cpu.cpp" in names and all(name.endswith("_cpu.cpp") for name in names)
