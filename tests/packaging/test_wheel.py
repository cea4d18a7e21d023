"""The wheel carries every file that the installed package needs, and works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CARRIED = ("errseg", "kernels", "bench", "csrc", "tests/golden")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from a copy, so that nothing is left in the checkout, and the wheel from that sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in CARRIED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    build("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(sdist), cwd=out)
    return next(out.glob("errseg-*.whl"))


def build(*arguments: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def installed_name(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "tests":
        relative = relative.relative_to("tests")
    return str(relative if relative.parts[0] == "errseg" else Path("errseg") / relative)


def test_wheel_has_every_source_file(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        installed_name(path)
        for name in CARRIED
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert sorted(expected - inside) == []
    assert [name for name in inside if not name.startswith(("errseg/", "errseg-"))] == []


@pytest.mark.parametrize("from_root", [False, True], ids=["foreign folder", "repository root"])
def test_installed_wheel_imports(wheel: Path, tmp_path: Path, from_root: bool) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path += {_dependencies()!r} + [{str(site)!r}]\n"
        "import errseg, errseg.kernels, errseg.bench, errseg.ops\n"
        "from errseg.verify.golden import golden_folder\n"
        "print(errseg.__file__, errseg.kernels.__file__, golden_folder(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT if from_root else tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Started in the repository, the checkout comes first on the path and must find its own folders.
    home, kernels, golden = (ROOT, "kernels", "tests/golden")
    if not from_root:
        home, kernels, golden = (site, "errseg/kernels", "errseg/golden")
    expected = [home / "errseg" / "__init__.py", home / kernels / "__init__.py", home / golden]
    assert [Path(line) for line in done.stdout.splitlines()] == expected


def _dependencies() -> list[str]:
    """Folders of installed packages; `-S` runs no .pth file there, so an editable install is not seen."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
