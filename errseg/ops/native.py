"""Backends in C++ and CUDA: found, or compiled on first use, and loaded; nothing happens at import.

A library that `setup.py` compiled (``ERRSEG_BUILD=cpu|cuda`` at install) is loaded when it comes from the very sources
that are here. Otherwise the first use compiles it into a cache, ``$ERRSEG_CACHE`` or ``~/.cache/errseg``, under a name
that holds sources, flags, torch, compiler and GPU architectures; ``ERRSEG_BUILD=0`` forbids that, ``cpu`` allows the
C++ library only, ``auto`` and ``cuda`` allow both.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errseg.ops import native_build
from errseg.ops.contract import Backend
from errseg.ops.native_build import Unavailable

NO_GPU = "no NVIDIA GPU"
_BUILD_TIMEOUT = 1800.0  # seconds


def cpu_backend(op_name: str, **options: Any) -> Backend:
    """A backend whose forward is ``errseg::<op_name>_cpu`` in the C++ library, with options of :class:`Backend`.

    ``trains=True`` says that the library has ``errseg::<op_name>_cpu_bwd`` too, ``backward=`` gives it in Python.
    """
    return _backend("cpu", **options)


def cuda_backend(op_name: str, **options: Any) -> Backend:
    """The same with ``errseg::<op_name>_cuda`` in the CUDA library, for machines with an NVIDIA GPU."""
    return _backend("cuda", **options)


def _backend(device: str, can_run: Callable[..., str | None] = lambda *args: None, **options: Any) -> Backend:
    def available() -> str | None:
        return why_not(device)

    # torch.compile calls this while it traces and takes the answer as a constant. Setting what
    # torch.compiler.assume_constant_result sets spares the import of the whole compiler.
    available._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def takes(*args: Any) -> str | None:
        for argument in args:
            if isinstance(argument, Tensor) and argument.device.type != device:
                return f"needs tensors on {device}, got {argument.device.type}"
        return can_run(*args)

    return Backend(available=available, can_run=takes, **options)


@functools.cache
def why_not(device: str) -> str | None:
    """``None`` when the native library of ``device`` is loaded, building it if need be, else the reason in a line."""
    if device == "cuda" and not (torch.cuda.is_available() and torch.version.cuda):
        return NO_GPU
    try:
        path = library(device)
        torch.ops.load_library(str(path))
    except Unavailable as error:
        return str(error)
    except OSError as error:
        return f"the native library does not load: {_one_line(str(error))}"
    return None


def library(device: str) -> Path:
    """The shared object for the sources that are here, compiled now if it has to be.

    Raises:
        Unavailable: there is none and none can be compiled; one line says why.
    """
    prebuilt = sorted(Path(__file__).parents[1].glob(f"{native_build.library_name(device)}.*"))
    if prebuilt:
        return prebuilt[0]
    mode = native_build.mode()
    if mode == "0" or (mode, device) == ("cpu", "cuda"):
        raise Unavailable(f"not compiled, and ERRSEG_BUILD={mode} forbids it")
    if not native_build.sources(device):
        raise Unavailable(f"no native sources for {device} in {native_build.source_root()}")
    archs = _archs() if device == "cuda" else ()
    path = cache_folder() / f"errseg_{device}-{_key(device, archs)}.so"
    if not path.is_file():
        _compile_once(device, archs, path)
    return path


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``ERRSEG_CACHE``, or errseg below the user's cache folder."""
    if named := os.environ.get("ERRSEG_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "errseg"
    except RuntimeError as error:
        raise Unavailable("no home folder to keep compiled kernels in: set ERRSEG_CACHE") from error


def _archs() -> tuple[int, ...]:
    """On first use only the GPUs that are here matter; other ones have another name in the cache."""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return native_build.wanted_archs([10 * major + minor for major, minor in capabilities])


def _key(device: str, archs: tuple[int, ...]) -> str:
    compiler = native_build.cxx()
    parts = [native_build.source_hash(device), torch.__version__, compiler, native_build.cxx_version(compiler)]
    if device == "cuda":
        parts += [native_build.nvcc_version(native_build.cuda_home()), *map(str, archs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _compile_once(device: str, archs: tuple[int, ...], path: Path) -> None:
    """One process compiles, others wait for it; the file appears whole or not at all."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
                    os.replace(_compile(device, archs, Path(folder), path), path)
    except OSError as error:
        raise Unavailable(f"cannot keep compiled kernels in {path.parent} ({error}): set ERRSEG_CACHE") from error


def _compile(device: str, archs: tuple[int, ...], folder: Path, path: Path) -> Path:
    if device == "cuda":
        native_build.check_cuda_version(native_build.cuda_home())
    sys.stderr.write(f"errseg: compiling the {device} kernels, once, into {path.parent}\n")
    # Not run as a script: its folder would come first on the path and shadow what torch imports.
    program = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", program, native_build.__file__, device, str(folder), *map(str, archs)]
    environment = {**os.environ, "CXX": native_build.cxx(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_BUILD_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"compiling took longer than {_BUILD_TIMEOUT:.0f} s") from error
    made = [*folder.glob("errseg_*.so"), *folder.glob("errseg_*.dylib")]
    if done.returncode != 0 or not made:
        log = path.with_suffix(".log")
        log.write_text(done.stdout)
        raise Unavailable(f"compiling failed: {_first_error(done.stdout)} (all of it: {log})")
    return made[0]


def _first_error(printed: str) -> str:
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return _one_line((errors or lines[-1:] or ["the compiler printed nothing"])[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
