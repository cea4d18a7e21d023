"""`errseg bench`: how fast, against what, and how sure; or what two results folders say of one machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from errseg.bench.precision import Precision
    from errseg.bench.rows import Row
    from errseg.bench.runner import Effort
    from errseg.bench.session import Request


def bench(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Ops by name, or what is built of them (--list); all by default.")
    ] = None,
    providers: Annotated[
        str | None,
        typer.Option(help="Comma-separated, e.g. published,reference,reference+compile,cpu; all that run by default."),
    ] = None,
    passes: Annotated[str | None, typer.Option(help="Comma-separated: forward, backward, both.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Comma-separated: float32, bfloat16, float16, autocast-bfloat16, autocast-float16.")
    ] = "float32",
    tf32: Annotated[bool, typer.Option("--tf32", help="Allow TF32 products.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder; by default bench/results/<date>-<machine>.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small size per target, no compilation: seconds.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also the sizes for curves over T, K, B and size.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Measure each provider at least so often.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Keep measuring a group for so long, up to 50 rounds.")] = 10.0,
    official: Annotated[
        Path | None, typer.Option(help="A checkout of the published ERR-Seg code, for the provider `official`.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the curves of the results folder.")] = True,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two results folders, old then new, and measure nothing.")
    ] = None,
    list_targets: Annotated[bool, typer.Option("--list", help="List targets and their sizes.")] = False,
) -> None:
    """Measure ops and networks against the published order of operations, after checking that they are right."""
    if compare is not None:
        _compare(*compare)
    elif list_targets:
        _list()
    else:
        _measure(
            _device(device),
            out,
            plots,
            targets=targets or (),
            providers=_split(providers),
            passes=_split(passes),
            precisions=[_precision(name, tf32) for name in _split(dtype)],
            effort=_effort(rounds, seconds),
            quick=quick,
            sweep=sweep,
            official=official,
        )


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _device(name: str | None) -> torch.device:
    import torch

    if name not in (None, "cpu", "cuda"):
        raise ErrSegError(f"no device {name!r}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ErrSegError("torch finds no usable CUDA device: use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _precision(name: str, tf32: bool) -> Precision:
    from errseg.bench.precision import Precision

    return Precision(name, tf32)


def _effort(rounds: int, seconds: float) -> Effort:
    from errseg.bench.runner import Effort

    return Effort(min_rounds=rounds, max_rounds=max(50, rounds), seconds=seconds)


def _measure(device: torch.device, out: Path | None, plots: bool, **wanted: Any) -> None:
    """Run, show, draw; exit code 1 when a row failed or nothing was measured."""
    from rich.console import Console

    from errseg.bench import session
    from errseg.bench.machine import results_folder
    from errseg.bench.table import show_reasons, show_rows

    folder = out or results_folder(device)
    request = session.Request(device=device, folder=folder, **wanted)
    console, progress = _console(), Console(stderr=True)
    with progress.status("starting") as status:
        say = status.update if progress.is_terminal else lambda text: None
        rows = session.run(request, say, lambda found: show_rows(found, console))
    show_reasons(rows, console)
    _show_promises(request, rows, console)
    if plots:
        _plot(folder, console)
    console.print(f"results in {folder}", soft_wrap=True, highlight=False)
    complaints = session.complaints(request, rows)
    if complaints:
        typer.echo(f"failed: {'; '.join(complaints)}", err=True)
        raise typer.Exit(1)


def _console() -> Console:
    """Wide enough for the tables where the output is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)


def _show_promises(request: Request, rows: list[Row], console: Console) -> None:
    from rich.markup import escape

    from errseg.bench.table import promises

    for target in request.chosen():
        for text, held in promises(target, rows):
            verdict = "[green]held[/]" if held else "[red]not held[/]"
            console.print(f"{verdict}  {escape(text)}", soft_wrap=True, highlight=False)


def _plot(folder: Path, console: Console) -> None:
    """Draw the curves of everything in the folder, if there are any."""
    from errseg.bench.plots import draw_plots, find_curves
    from errseg.bench.rows import read_cards, read_rows

    rows = read_rows(folder)
    if not find_curves(rows):
        return
    machines = sorted({card["machine"] for card in read_cards(folder).values()})
    try:
        paths = draw_plots(rows, folder / "plots", ", ".join(machines))
    except ErrSegError as error:
        console.print(f"no plots: {error}", markup=False, highlight=False)
    else:
        console.print(f"{len(paths)} plots in {folder / 'plots'}", soft_wrap=True, highlight=False)


def _compare(old: Path, new: Path) -> None:
    """Say what changed; exit code 1 on a regression beyond the spread or a missing row."""
    from errseg.bench.compare import compare

    verdicts = compare(old, new)
    for verdict in verdicts:
        if verdict.kind != "same":
            typer.echo(f"{verdict.kind:8} {verdict.row.name}: {verdict.text}")
    bad = sum(verdict.bad for verdict in verdicts)
    typer.echo(f"{len(verdicts)} rows compared, {bad} of them worse")
    if bad:
        raise typer.Exit(1)


def _list() -> None:
    from errseg.bench.registry import find_target, target_names

    for name in target_names():
        target = find_target(name)
        typer.echo(f"{name}: {', '.join(target.passes)}")
        for case in target.cases:
            typer.echo(f"    {case.label}")
        typer.echo(f"    --quick: {target.quick.label}; --sweep: {len(target.sweeps)} more")
