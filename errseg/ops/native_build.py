"""How the native libraries are compiled: sources, flags, toolkits.

Only the standard library is imported at the top and nothing of errseg, so that `setup.py` can load this file and
:mod:`errseg.ops.native` can run it as a program in a process of its own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEVICES = ("cpu", "cuda")
MODES = ("auto", "0", "cpu", "cuda")
ARCHS = (80, 90, 100)  # what a library that is built ahead of its use runs on; PTX serves what is newer

# LibTorch's stable ABI of 2.10: one binary for every torch from then on.
_DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
# No -ffast-math: it would switch denormals off for the whole process. These let loops vectorise all the same.
_VECTORISE = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
CXX_FLAGS = (*_DEFINES, *_VECTORISE, "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas")
NVCC_FLAGS = (*_DEFINES, "-DUSE_CUDA", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden")

_USUAL_CUDA_HOME = Path("/usr/local/cuda")
_SUFFIXES = {"cpu": (".h", "_cpu.cpp"), "cuda": (".h", ".cuh", "_cuda.cu")}


class Unavailable(Exception):
    """Why nothing can be compiled here, in one line."""


def mode() -> str:
    """``ERRSEG_BUILD``: auto (the default), 0, cpu or cuda."""
    value = os.environ.get("ERRSEG_BUILD", "") or "auto"
    if value not in MODES:
        raise Unavailable(f"expected {', '.join(MODES)}, got {value!r} in ERRSEG_BUILD")
    return value


def source_root() -> Path:
    """The folder csrc: inside the installed package, or at the root of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "csrc", package.parent / "csrc"
    return installed if installed.is_dir() else checkout


def sources(device: str) -> list[Path]:
    """The files that the compiler is called on."""
    return sorted(source_root().glob(f"*/*{_SUFFIXES[device][-1]}"))


def source_hash(device: str) -> str:
    """Hexadecimal digits that change with any source, header or flag of a library."""
    root = source_root()
    digest = hashlib.sha256(repr((CXX_FLAGS, NVCC_FLAGS if device == "cuda" else ())).encode())
    for path in sorted(root.glob("*/*")):
        if path.name.endswith(_SUFFIXES[device]):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def library_name(device: str) -> str:
    """Name of a library built by `setup.py`; another version of the sources has another one."""
    return f"_native_{device}_{source_hash(device)}"


# ---- compilers


def _run(*command: str) -> str:
    """What a compiler prints on both streams; it may be a wrapper script, so a failure is an answer too."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    return done.stdout


def _check_python_side() -> None:
    for module in ("torch", "setuptools"):
        try:
            __import__(module)
        except ImportError as error:
            raise Unavailable(
                f"compiling needs {module}, which is not here (at install: {module} first, then --no-build-isolation)"
            ) from error


def cxx() -> str:
    """The C++ compiler's command, ``CXX`` or ``c++``."""
    command = os.environ.get("CXX", "") or "c++"
    if shutil.which(shlex.split(command)[0]) is None:
        raise Unavailable(f"no C++ compiler ({command} not found): install g++ or clang, or set CXX")
    return command


@functools.cache
def cxx_version(command: str) -> str:
    """First line of ``--version``."""
    return _run(*shlex.split(command), "--version").partition("\n")[0]


@functools.cache
def cuda_home() -> Path:
    """The CUDA toolkit's own folder, also where ``nvcc`` on the path is a wrapper script or a link."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(variable)
        if folder and (Path(folder) / "bin" / "nvcc").is_file():
            return Path(folder)
    nvcc = shutil.which("nvcc")
    if nvcc:
        # nvcc names the folder of its real binary among the steps that it would take.
        found = re.search(r"^#\$ _HERE_=(.+)$", _run(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
        home = (Path(found[1].strip()) if found else Path(nvcc).resolve().parent).parent
        if (home / "bin" / "nvcc").is_file():
            return home
    if (_USUAL_CUDA_HOME / "bin" / "nvcc").is_file():
        return _USUAL_CUDA_HOME.resolve()
    raise Unavailable("no nvcc: install the CUDA toolkit, or set CUDA_HOME")


@functools.cache
def nvcc_version(home: Path) -> str:
    """Release of a toolkit, such as ``13.0.88``."""
    printed = _run(str(home / "bin" / "nvcc"), "--version")
    found = re.search(r"V([\d.]+)", printed)
    if found is None:
        raise Unavailable(f"{home}/bin/nvcc does not tell its version")
    return found[1]


def check_cuda_version(home: Path) -> None:
    """Raises :class:`Unavailable` when toolkit and torch are of different major versions."""
    import torch

    wanted = torch.version.cuda
    if wanted is None:
        raise Unavailable("this torch was built without CUDA")
    if nvcc_version(home).split(".")[0] != wanted.split(".")[0]:
        raise Unavailable(f"nvcc {nvcc_version(home)} cannot build for a torch of CUDA {wanted}: majors differ")


def wanted_archs(visible: Sequence[int] = ()) -> tuple[int, ...]:
    """Compute capabilities to build for: ``TORCH_CUDA_ARCH_LIST``, else the GPUs of a first use, else all."""
    listed = re.findall(r"(\d+)\.(\d+)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    return tuple(sorted({int(major + minor) for major, minor in listed} or set(visible) or set(ARCHS)))


def gencode(archs: Sequence[int], home: Path) -> list[str]:
    """nvcc's flags: machine code for the capabilities that it knows, PTX for whatever is newer."""
    listed = re.findall(r"compute_(\d+)\b", _run(str(home / "bin" / "nvcc"), "--list-gpu-arch"))
    known = {int(number) for number in listed}
    virtual = max((arch for arch in known if arch <= max(archs)), default=None)
    if virtual is None:
        raise Unavailable(f"nvcc {nvcc_version(home)} knows no GPU as old as sm_{max(archs)}")
    real = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs if arch in known]
    return [*real, f"-gencode=arch=compute_{virtual},code=compute_{virtual}"]


# ---- building


def extension(device: str, name: str, archs: Sequence[int] = ARCHS, relative_to: Path | None = None) -> Any:
    """The setuptools extension of a library; it has no Python symbols.

    Raises:
        Unavailable: torch, setuptools or a compiler is missing.
    """
    _check_python_side()
    cxx()
    arguments = {"cxx": list(CXX_FLAGS)}
    if device == "cuda":
        home = cuda_home()
        check_cuda_version(home)
        os.environ["CUDA_HOME"] = str(home)  # read when torch.utils.cpp_extension is imported
        arguments["nvcc"] = [*NVCC_FLAGS, *gencode(archs, home)]
    from torch.utils import cpp_extension

    make = cpp_extension.CUDAExtension if device == "cuda" else cpp_extension.CppExtension
    files = [str(path.relative_to(relative_to) if relative_to else path) for path in sources(device)]
    return make(
        name,
        files,
        include_dirs=[str(source_root())],
        extra_compile_args=arguments,
        extra_link_args=["-Wl,--as-needed", "-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )


def build_command() -> Any:
    """setuptools' ``build_ext`` as torch extends it: with ninja where that is installed."""
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension.with_options(no_python_abi_suffix=True)


def main(device: str, folder: str, *archs: str) -> None:
    """Compile one library into ``folder``, where its one shared object is found afterwards."""
    from setuptools import Distribution

    modules = [extension(device, f"errseg_{device}", [int(arch) for arch in archs] or ARCHS)]
    distribution = Distribution({"ext_modules": modules, "cmdclass": {"build_ext": build_command()}})
    command = distribution.get_command_obj("build_ext")
    command.build_lib = folder
    command.build_temp = str(Path(folder) / "objects")
    distribution.run_command("build_ext")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Unavailable as error:
        sys.exit(str(error))
