"""Where packages come from, and native libraries when ERRSEG_BUILD asks for them; all else is in pyproject.toml.

ERRSEG_BUILD=cpu compiles the C++ library at install, ERRSEG_BUILD=cuda the CUDA one too; both need torch installed and
`--no-build-isolation`. Otherwise nothing is compiled here, so that an installation never depends on what happens to be
on the machine: the first use of a native backend compiles it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# `kernels`, `bench` and `csrc` live beside `errseg` in the repository and inside it once installed.
ROOMS = {"errseg.kernels": "kernels", "errseg.bench": "bench"}
# The golden numbers of the tests, which `errseg verify` reads: files, no modules.
GOLDEN = "tests/golden"
NATIVE_SOURCES = ["*.md", "**/*.h", "**/*.cuh", "**/*.cpp", "**/*.cu"]


def room_packages() -> list[str]:
    """Return the mapped packages with their subpackages, under their import names."""
    names = []
    for name, folder in ROOMS.items():
        names += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return names


def native() -> dict[str, Any]:
    """Return what setuptools needs to compile the libraries that ERRSEG_BUILD names."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "errseg" / "ops" / "native_build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        wanted = {"cpu": ["cpu"], "cuda": ["cpu", "cuda"]}.get(build.mode(), [])
        modules = [
            build.extension(device, f"errseg.{build.library_name(device)}", relative_to=ROOT)
            for device in wanted[::-1]  # CUDA first: it says where its toolkit is before torch looks for one
        ]
    except build.Unavailable as error:
        raise SystemExit(f"ERRSEG_BUILD={os.environ.get('ERRSEG_BUILD')}: {error}") from None
    if not modules:
        return {}
    # The libraries hold no Python symbols, so that one wheel serves every Python from 3.10 on.
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": build.build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["errseg", "errseg.*"]), *room_packages(), "errseg.csrc", "errseg.golden"],
    package_dir={"errseg": "errseg", **ROOMS, "errseg.csrc": "csrc", "errseg.golden": GOLDEN},
    package_data={
        "errseg": ["py.typed", "assets/**/*", "configs/**/*.yaml", "data/classes/*.tsv"],
        "errseg.bench": ["*.sh", "results/**/*"],
        "errseg.csrc": NATIVE_SOURCES,
        "errseg.golden": ["*.md", "*.safetensors", "keys/*.tsv"],
    },
    include_package_data=False,
    **native(),
)
