"""The frame of the command line: help, exit codes, and one line for every error that a person can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import errseg
from errseg.cli import COMMANDS, OneLineErrors, app
from errseg.errors import ErrSegError

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "torchvision", "open_clip", "timm", "triton", "accelerate", "huggingface_hub", "matplotlib"}


def failing_app(error: BaseException) -> typer.Typer:
    small = typer.Typer(cls=OneLineErrors)

    @small.callback()
    def options() -> None: ...

    @small.command()
    def fail(count: int = 0) -> None:
        raise error

    return small


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ErrSegError("no such model: x;\n use y"), "error: no such model: x; use y\n"),
        (PermissionError(13, "Permission denied", "out.png"), "error: Permission denied: out.png\n"),
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        (MemoryError(), "error: out of memory on this machine: "),
        (RuntimeError("[alloc] DefaultCPUAllocator: can't allocate memory"), "error: out of memory on this "),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "error: out of memory on the GPU",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_line(error: Exception, line: str) -> None:
    result = CliRunner().invoke(failing_app(error), ["fail"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback_before_the_line(args: list[str]) -> None:
    result = CliRunner().invoke(failing_app(ErrSegError("why")), args)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("\nerror: why\n")


def test_debug_by_environment() -> None:
    result = CliRunner().invoke(failing_app(ErrSegError("why")), ["fail"], env={"ERRSEG_DEBUG": "1"})
    assert "Traceback" in result.stderr


def test_an_interrupt_exits_130() -> None:
    result = CliRunner().invoke(failing_app(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_an_exit_code_is_kept() -> None:
    assert CliRunner().invoke(failing_app(typer.Exit(7)), ["fail"]).exit_code == 7


def test_a_bug_keeps_its_exception() -> None:
    assert isinstance(CliRunner().invoke(failing_app(KeyError("bug")), ["fail"]).exception, KeyError)


@pytest.mark.parametrize(
    "args",
    [["fail", "--no-such-option"], ["fail", "--count", "many"], ["fial"], ["--wrong"], ["fail", "extra"]],
)
def test_usage_errors_are_one_line(args: list[str]) -> None:
    result = CliRunner().invoke(failing_app(ErrSegError("unused")), args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_names_every_command(args: list[str]) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{errseg.__version__}\n")


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, errseg.cli\n"
        "try: errseg.cli.app(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"sys.exit(' '.join({HEAVY!r} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "errseg", "no-such-command"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
