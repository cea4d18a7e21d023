"""Kernels compiled for the emulator and called with tensors, in this process or in a sanitized one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-g0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
THOROUGH, QUICK = ("-O1",), ("-O0", "-DDRIVER_FEW_TYPES")  # what runs once or twice is sooner compiled than optimised
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


class EmulatorFault(Exception):
    """What the emulator or a sanitizer found."""


def why_not() -> str | None:
    """``None`` when kernels can be emulated here."""
    if sys.platform != "linux":
        return "the emulator needs Linux: ucontext, and gcc's sanitizers"
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler: {COMPILER} not found"
    return None


@cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@cache
def _runtime(name: str) -> str:
    command = [COMPILER, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Emulated:
    """A driver from `drivers/`, compiled once for its sources.

    ``edits`` maps a source below csrc to (text, replacement), for kernels that are broken on purpose; ``sanitized``
    runs every call in a process of its own under AddressSanitizer and UndefinedBehaviorSanitizer.
    """

    def __init__(
        self,
        driver: str,
        cache_folder: Path,
        *,
        sanitized: bool = False,
        edits: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.sanitized = sanitized
        self.path = self._build(driver, cache_folder, dict(edits or {}))
        self.library = None if sanitized else ctypes.CDLL(str(self.path))

    def __call__(self, function: str, *arguments: Tensor | int | bool | None) -> None:
        """Call ``function``; tensors are read and written in place.

        Raises:
            EmulatorFault: with the finding.
        """
        for argument in arguments:
            assert not isinstance(argument, Tensor) or argument.is_contiguous()
        if self.sanitized:
            return self._call_sanitized(function, arguments)
        assert self.library is not None
        entry = getattr(self.library, function)
        entry.restype = ctypes.c_char_p
        message = entry(*(_argument(a) for a in arguments))
        if message is not None:
            raise EmulatorFault(message.decode())
        return None

    def _call_sanitized(self, function: str, arguments: tuple[Tensor | int | bool | None, ...]) -> None:
        raw = [_bytes(a) if isinstance(a, Tensor) else a for a in arguments]
        # With libstdc++ there from the start AddressSanitizer can follow exceptions.
        preload = " ".join(map(_runtime, ("libasan.so", "libstdc++.so")))
        environment = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run(
            [sys.executable, "-S", "-E", str(HERE / "replay.py")],
            input=pickle.dumps((str(self.path), function, raw)),
            capture_output=True,
            env=environment,
            timeout=120,
        )
        if done.returncode != 0:
            raise EmulatorFault(done.stderr.decode(errors="replace"))
        message, written = pickle.loads(done.stdout)
        if message is not None:
            raise EmulatorFault(message.decode())
        for argument, content in zip(arguments, written, strict=True):
            if isinstance(argument, Tensor) and argument.numel():
                argument.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def _build(self, driver: str, cache_folder: Path, edits: dict[str, tuple[str, str]]) -> Path:
        edited = {}
        for name, (old, new) in edits.items():
            text = (SOURCES / name).read_text()
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
            edited[name] = text.replace(old, new)
        flags = (*FLAGS, *(QUICK if edits or self.sanitized else THOROUGH), *(SANITIZERS if self.sanitized else ()))
        read = [*SOURCES.glob("*/*.cuh"), *HERE.glob("*.h"), *HERE.glob("drivers/*.h"), HERE / f"drivers/{driver}.cpp"]
        digest = hashlib.sha256(repr((flags, _compiler_version(), sorted(edited.items()))).encode())
        for path in sorted(read):
            digest.update(path.name.encode() + path.read_bytes())
        library = cache_folder / f"{driver}-{digest.hexdigest()[:20]}.so"
        if library.is_file():
            library.touch()
            return library
        with tempfile.TemporaryDirectory(dir=cache_folder) as folder:
            for name, text in edited.items():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_text(text)
            made = Path(folder) / "made.so"
            include = ["-include", str(HERE / "emulator.h"), f"-I{folder}", f"-I{SOURCES}"]
            command = [COMPILER, *flags, *include, str(HERE / f"drivers/{driver}.cpp"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(made, library)
        return library


def _argument(value: Tensor | int | bool | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
