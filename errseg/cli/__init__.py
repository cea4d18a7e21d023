"""The `errseg` command: one module per sub-command, heavy imports only inside the command that runs.

A sub-command is a typer function named like its module; its name in `COMMANDS` is all it needs. One with
sub-commands of its own is a typer app named `app`, its module's name in `GROUPS`.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import errseg
from errseg.errors import ErrSegError

COMMANDS = ("segment", "demo", "train", "eval", "info", "verify", "bench")
GROUPS = ("data", "vocab")

USAGE_EXIT = 2
INTERRUPT_EXIT = 130
# typer has moved its copy of click between releases; this is click's UsageError in all of them.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """A command group that says what a person can mend in one line on stderr, exit code 2, and no traceback.

    `--debug` anywhere on the line, or ERRSEG_DEBUG=1, prints the traceback before that line.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments, debug = _take_debug(sys.argv[1:] if args is None else list(args))
        prog_name = prog_name or "errseg"
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            result = super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            result = INTERRUPT_EXIT
        except Exception as error:
            line = describe(error)
            if line is None:
                raise
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {line}", err=True)
            sys.exit(USAGE_EXIT)
        # Outside standalone mode an Exit is returned as its code; commands themselves return nothing.
        code = result if isinstance(result, int) else 0
        if code == INTERRUPT_EXIT:
            typer.echo("interrupted", err=True)
        sys.exit(code)


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--debug` and whether tracebacks are wanted."""
    end = args.index("--") if "--" in args else len(args)
    kept = [arg for arg in args[:end] if arg != "--debug"]
    asked = len(kept) < end or os.environ.get("ERRSEG_DEBUG", "") not in ("", "0")
    return kept + args[end:], asked


def describe(error: BaseException) -> str | None:
    """Return one line for an error that a person can mend, None for a bug that deserves its traceback."""
    if isinstance(error, ErrSegError):
        return _one_line(str(error))
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "errseg"
        return f"{_one_line(error.format_message())} Try `{command} --help`."  # type: ignore[attr-defined]
    if _is_out_of_memory(error):
        where = "on the GPU" if "CUDA" in str(error) else "on this machine"
        return f"out of memory {where}: use smaller or fewer pictures, a smaller --size, or another --device"
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename else ""
        return _one_line(f"{error.strerror}{named}")
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


app = typer.Typer(
    name="errseg",
    cls=OneLineErrors,
    help="Open-vocabulary semantic segmentation: any picture, any words.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also ERRSEG_DEBUG=1).")
    ] = False,
) -> None:
    if version:
        typer.echo(errseg.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _name in COMMANDS:
    app.command(_name)(getattr(importlib.import_module(f"errseg.cli.{_name}"), _name))
for _name in GROUPS:
    app.add_typer(importlib.import_module(f"errseg.cli.{_name}").app, name=_name)


def main() -> None:
    """Run the command line and exit with its code."""
    app()
