"""Where packages come from; everything else stands in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

# `kernels`, `bench` and `csrc` live beside `errseg` in the repository and inside it once installed.
ROOMS = {"errseg.kernels": "kernels", "errseg.bench": "bench"}
NATIVE_SOURCES = ["*.md", "**/*.h", "**/*.cuh", "**/*.cpp", "**/*.cu"]


def room_packages() -> list[str]:
    """Return the mapped packages with their subpackages, under their import names."""
    names = []
    for name, folder in ROOMS.items():
        names += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return names


setup(
    packages=[*find_packages(include=["errseg", "errseg.*"]), *room_packages(), "errseg.csrc"],
    package_dir={"errseg": "errseg", **ROOMS, "errseg.csrc": "csrc"},
    package_data={
        "errseg": ["py.typed", "assets/**/*"],
        "errseg.bench": ["results/**/*"],
        "errseg.csrc": NATIVE_SOURCES,
    },
    include_package_data=False,
)
