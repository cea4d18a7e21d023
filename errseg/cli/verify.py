"""`errseg verify`: is every kernel right, is the model right, and does the published code agree."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


WIDTH = 150  # of logs and files; a terminal has its own


def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes only: a few minutes.")] = False,
    ops: Annotated[
        str | None, typer.Option(help="Comma-separated ops; all, and the golden numbers, by default.")
    ] = None,
    backends: Annotated[
        str | None, typer.Option(help="Comma-separated out of reference, cpu, triton, cuda; all that run by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    official: Annotated[
        Path | None, typer.Option(help="Compare with a checkout of the published ERR-Seg code, and with that alone.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help='Only cases with this text in their name, such as "L, 48x48"; may be given several times.'),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write JSON lines to this file, or to standard output for '-'.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every row.")] = False,
) -> None:
    """Measure every op on every backend against float64 and beside eager PyTorch, then the model's golden numbers.

    Errors may be at most twice those of eager PyTorch in the same precision; labels, votes and selections must be
    equal except at proven ties. Exit code 1 when anything fails or nothing was executed.
    """
    import torch
    from rich.console import Console

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cpu":
        # Without a GPU Triton's kernels run in its interpreter, which has to be said before Triton is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from errseg import verify as package
    from errseg.verify import report

    with _output(json_file) as stream:
        console = Console(stderr=json_file == "-")
        if not console.is_terminal:
            console = Console(stderr=json_file == "-", width=WIDTH)
        settings: dict[str, Any] = {"quick": quick, "ops": _names(ops), "backends": _names(backends), "only": only}
        write = (lambda line: None) if stream is None else partial(report.write_json, stream=stream)
        write(report.card(torch.device(chosen), settings | {"official": official is not None}))
        with _progress(console) as progress:
            rows = package.run(
                quick=quick,
                ops=_names(ops),
                backends=_names(backends),
                device=chosen,
                official=official,
                only=only or None,
                progress=progress,
                on_row=lambda row: write(row.to_dict()),
            )
        report.show(rows, console, verbose=verbose)
        write(report.summary(rows))
    if not package.succeeded(rows):
        raise typer.Exit(1)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def _output(name: str | None) -> Iterator[Any]:
    """Where JSON goes; opened first, so that a file that cannot be written is known before the work."""
    if name is None or name == "-":
        yield sys.stdout if name else None
        return
    with open(name, "w", encoding="utf-8") as stream:
        yield stream


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int, str], object]]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)
