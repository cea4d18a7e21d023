"""Finding, compiling and caching the native libraries, and the one line that says why there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from errseg import ops
from errseg.ops import native, native_build

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, nothing compiled at install, and answers that nobody remembers afterwards."""
    monkeypatch.setenv("ERRSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ERRSEG_BUILD", raising=False)
    monkeypatch.setattr(native_build, "library_name", lambda device: "absent")
    forgetful = (native.why_not, native_build.cuda_home, native_build.nvcc_version)
    for function in forgetful:
        function.cache_clear()
    yield tmp_path / "cache"
    for function in forgetful:
        function.cache_clear()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def check_fallback(reason: str) -> None:
    """Named, the backend raises with the reason; unnamed, the reference runs."""
    pixels, words = torch.randn(1, 4, 3, 3), torch.randn(5, 4)
    with pytest.raises(ops.BackendError) as raised:
        ops.class_votes(pixels, words, backend="cpu")
    assert str(raised.value) == f"class_votes cannot run: cpu: {reason}"
    assert "\n" not in reason
    expected = ops.class_votes(pixels, words, backend="reference")
    assert torch.equal(ops.class_votes(pixels, words), expected)
    assert ops.backends()["class_votes"]["cpu"] == reason


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ERRSEG_BUILD", "0", "not compiled, and ERRSEG_BUILD=0 forbids it"),
        ("ERRSEG_BUILD", "perhaps", "expected auto, 0, cpu, cuda, got 'perhaps' in ERRSEG_BUILD"),
        ("CXX", "no-such-c++", "no C++ compiler (no-such-c++ not found): install g++ or clang, or set CXX"),
    ],
)
def test_what_forbids_compiling_is_said_in_a_line(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    check_fallback(reason)


def test_a_folder_that_takes_no_files_is_named(fresh: Path) -> None:
    fresh.write_text("a file where the cache should be")
    check_fallback(native.why_not("cpu") or "")
    assert str(native.why_not("cpu")).startswith(f"cannot keep compiled kernels in {fresh} (")


def test_a_failing_compiler_is_quoted_and_leaves_a_log(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = 'case "$*" in *--version*|*-dump*) exec c++ "$@";; esac; echo "x.cpp:1: error: no room left"; exit 1'
    monkeypatch.setenv("CXX", str(script(fresh.parent / "bin" / "g++", command)))
    reason = native.why_not("cpu")
    (log,) = fresh.glob("*.log")
    assert reason == f"compiling failed: x.cpp:1: error: no room left (all of it: {log})"
    check_fallback(reason)
    assert capfd.readouterr().err == f"errseg: compiling the cpu kernels, once, into {fresh}\n"
    assert not list(fresh.glob("*.so")) and not list(fresh.glob(".build-*"))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, which a test may change."""
    copy = tmp_path / "csrc"
    shutil.copytree(native_build.source_root(), copy)
    monkeypatch.setattr(native_build, "source_root", lambda: copy)
    return copy


def test_the_name_in_the_cache_follows_all_that_matters(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [native._key("cpu", ())]

    def changed() -> bool:
        keys.append(native._key("cpu", ()))
        return keys[-1] not in keys[:-1]

    (tree / "class_votes" / "notes.txt").write_text("not a source")
    (tree / "class_votes" / "class_votes.cuh").write_text("not of this library")
    assert not changed()
    for path in (tree / "class_votes" / "class_votes_cpu.cpp", tree / "common" / "simd.h"):
        path.write_bytes(path.read_bytes() + b"\n")
        assert changed()
    (tree / "new_op").mkdir()
    (tree / "new_op" / "new_op_cpu.cpp").write_text("")
    assert changed()
    monkeypatch.setattr(native_build, "CXX_FLAGS", (*native_build.CXX_FLAGS, "-O1"))
    assert changed()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert changed()
    monkeypatch.setattr(native_build, "cxx_version", lambda command: "g++ 99")
    assert changed()


def test_a_second_use_finds_what_the_first_compiled(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Path] = []

    def compile_(device: str, archs: tuple[int, ...], folder: Path, path: Path) -> Path:
        compiled.append(path)
        made = folder / "made.so"
        made.write_bytes(b"library")
        return made

    monkeypatch.setattr(native, "_compile", compile_)
    first = native.library("cpu")
    assert first.read_bytes() == b"library" and first.parent == fresh
    assert native.library("cpu") == first and compiled == [first]
    assert sorted(path.suffix for path in fresh.iterdir()) in ([".so"], [".lock", ".so"])


def test_a_library_that_does_not_load_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.mkdir()
    (fresh / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "library", lambda device: fresh / "broken.so")
    check_fallback(native.why_not("cpu") or "")
    assert "does not load" in (native.why_not("cpu") or "")


def test_without_an_nvidia_gpu_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.why_not("cuda") == "no NVIDIA GPU"


# ---- toolkits


def fake_toolkit(home: Path, release: str = "13.0.88", archs: str = "75 80 86 90 100") -> Path:
    listed = "".join(f"compute_{arch}\\n" for arch in archs.split())
    script(
        home / "bin" / "nvcc",
        f'case "$1" in --version) echo "release 13.0, V{release}";; --list-gpu-arch) printf "{listed}";;\n'
        f'--dryrun) echo "#$ _SPACE_= "; echo "#$ _HERE_={home}/bin";; esac',
    )
    return home


@pytest.fixture
def no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + os.pathsep + "/usr/bin:/bin")
    monkeypatch.setattr(native_build, "_USUAL_CUDA_HOME", tmp_path / "usual")


@pytest.mark.usefixtures("no_toolkit")
def test_the_toolkit_behind_a_wrapper_script_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_toolkit(tmp_path / "toolkit")
    script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert native_build.cuda_home() == home
    native_build.cuda_home.cache_clear()
    named = fake_toolkit(tmp_path / "named")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert native_build.cuda_home() == named


@pytest.mark.usefixtures("no_toolkit")
def test_the_usual_toolkit_comes_last(tmp_path: Path) -> None:
    with pytest.raises(native_build.Unavailable, match=r"^no nvcc: install the CUDA toolkit, or set CUDA_HOME$"):
        native_build.cuda_home()
    assert native_build.cuda_home.cache_info().currsize == 0
    assert fake_toolkit(tmp_path / "usual") == native_build.cuda_home()


@pytest.mark.usefixtures("no_toolkit")
def test_versions_are_compared_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "9.2")
    with pytest.raises(native_build.Unavailable, match=r"nvcc 13\.0\.88 cannot build for a torch of CUDA 9\.2"):
        native_build.check_cuda_version(fake_toolkit(tmp_path / "toolkit"))
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    native_build.check_cuda_version(tmp_path / "toolkit")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(native_build.Unavailable, match="built without CUDA"):
        native_build.check_cuda_version(tmp_path / "toolkit")


@pytest.mark.usefixtures("no_toolkit")
@pytest.mark.parametrize(
    ("wanted", "known", "code"),
    [
        ((80, 90, 100), "80 90 100 120", "sm_80 sm_90 sm_100 compute_100"),
        ((80, 90, 100), "75 80 86 89 90", "sm_80 sm_90 compute_90"),  # an older toolkit
        ((86,), "80 86 90", "sm_86 compute_86"),
        ((103,), "80 90 100", "compute_100"),  # a newer GPU
    ],
)
def test_architectures(tmp_path: Path, wanted: tuple[int, ...], known: str, code: str) -> None:
    flags = native_build.gencode(wanted, fake_toolkit(tmp_path / "toolkit", archs=known))
    assert [flag.rpartition("code=")[2] for flag in flags] == code.split()


def test_wanted_architectures_depend_on_no_gpu_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert native_build.wanted_archs() == (80, 90, 100)
    assert native_build.wanted_archs([90, 90]) == (90,)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;10.0+PTX")
    assert native_build.wanted_archs([90]) == (86, 100)
