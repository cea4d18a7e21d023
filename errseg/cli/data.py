"""`errseg data`: the benchmarks' label maps, made and checked."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from errseg.cli.progress import Report
    from errseg.data.datasets import Benchmark
    from errseg.data.prepare.checking import Verdict

OWN = "own"
_SHOWN = 20  # lines of a kind before "and so many more"

app = typer.Typer(help="Prepare and check data sets.")

_SET = Annotated[
    str,
    typer.Argument(
        metavar="SET",
        help="COCO-Stuff-171, ADE-150, ADE-847, PAS-20, PAS-20b, PC-59 or PC-459; "
        '"own" to verify a folder with images/, labels/ and classes.txt.',
        show_default=False,
    ),
]
_ROOT = Annotated[
    Path | None,
    typer.Argument(
        metavar="[ROOT]",
        help="Folder of all sets; by default $ERRSEG_DATASETS, $DETECTRON2_DATASETS or ./datasets.",
        show_default=False,
    ),
]
_SPLIT = Annotated[str | None, typer.Option(help="train or val; all that there are by default.")]
_WORKERS = Annotated[int | None, typer.Option(min=1, help="Threads; one per core, at most 16, by default.")]


@app.callback(invoke_without_command=True)
def options(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def prepare(
    name: _SET,
    root: _ROOT = None,
    split: _SPLIT = None,
    workers: _WORKERS = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write what is there already anew.")] = False,
) -> None:
    """Write a set's label maps from its original files.

    What is there and good is kept: run it again after an interruption. Folders prepared for the published code
    bases need nothing. A file that cannot be converted is reported and the rest goes on; the exit code is then 2.
    """
    if name.lower() == OWN:
        raise ErrSegError("one's own data needs no preparation: `errseg data verify own FOLDER` checks it")
    from errseg.data.datasets import datasets_root, find_benchmark

    benchmark, base = find_benchmark(name), datasets_root(root)
    failed = 0
    for part in _splits(benchmark, split, base):
        failed += _prepare(benchmark, part, base, workers=workers, overwrite=overwrite)
    if failed:
        raise typer.Exit(2)


def _splits(benchmark: Benchmark, wanted: str | None, root: Path) -> list[str]:
    """The splits asked for: all whose original labels are there, if none was named."""
    if wanted is not None:
        benchmark.split(wanted)
        return [wanted]
    names = list(benchmark.splits)
    if len(names) == 1:
        return names
    there = [
        name
        for name in names
        if (root / benchmark.splits[name].labels.replace("annotations_detectron2", "annotations")).is_dir()
    ]
    for name in names:
        if there and name not in there:
            typer.echo(f"{benchmark.name} {name}: original labels not there, passed over", err=True)
    return there or names[-1:]


def _prepare(benchmark: Benchmark, split: str, root: Path, **options: Any) -> int:
    """Prepare one split and say what was done; the number of failures."""
    from errseg.data.prepare import prepare as run

    with _progress(f"{benchmark.name} {split}") as report:
        summary, passed_over = run(benchmark, root, split=split, progress=report, **options)
    _lines("note: ", passed_over)
    _lines("error: ", summary.failed)
    typer.echo(
        f"{benchmark.name} {split}: {summary.written:,} label maps written, {summary.kept:,} were there"
        + (f", {summary.left_out:,} left out (nothing but ignored pixels)" if summary.left_out else "")
        + (f", {len(summary.failed):,} failed" if summary.failed else "")
        + f"; {root / benchmark.splits[split].labels}"
    )
    return len(summary.failed)


def _lines(prefix: str, lines: list[str]) -> None:
    for line in lines:
        typer.echo(prefix + " ".join(line.split()), err=True)


@app.command()
def verify(name: _SET, root: _ROOT = None, split: _SPLIT = None, workers: _WORKERS = None) -> None:
    """Read all of a prepared set: what is missing, how many files, which values, where to get it.

    The exit code is 2 unless the set is complete and sound.
    """
    from errseg.data.datasets import datasets_root, find_benchmark
    from errseg.data.prepare.checking import verify as check
    from errseg.data.prepare.checking import verify_folder

    verdicts = []
    if name.lower() == OWN:
        if root is None:
            raise ErrSegError("say which folder: errseg data verify own FOLDER")
        with _progress(str(root)) as report:
            verdicts.append(verify_folder(root, workers=workers, progress=report))
    else:
        benchmark, base = find_benchmark(name), datasets_root(root)
        for part in benchmark.splits if split is None else [split]:
            with _progress(f"{benchmark.name} {part}") as report:
                verdicts.append(check(benchmark, base, split=part, workers=workers, progress=report))
    for verdict in verdicts:
        _show(verdict)
    bad = [verdict.name for verdict in verdicts if not verdict.complete]
    if bad:
        raise ErrSegError(f"{', '.join(bad)}: not complete, see above")


def _show(verdict: Verdict) -> None:
    counts = " or ".join(f"{n:,}" for n in verdict.expected)
    expected = f", expected {counts}" if counts else ""
    typer.echo(f"{verdict.name}: {'complete' if verdict.complete else 'NOT complete'}")
    typer.echo(f"  files    {verdict.images:,} pictures, {verdict.labels:,} labels{expected}; {verdict.pairs:,} pairs")
    if verdict.pairs:
        typer.echo(f"  values   {_values(verdict)}")
    for title, lines in (
        ("problem", verdict.problems),
        ("note", verdict.notes),
        ("missing", verdict.missing_sources),
    ):
        for line in lines[:_SHOWN]:
            typer.echo(f"  {title:<8} {' '.join(line.split())}")
        if len(lines) > _SHOWN:
            typer.echo(f"  {title:<8} and {len(lines) - _SHOWN:,} more")


def _values(verdict: Verdict) -> str:
    """Which of the classes occur, and whether ignored pixels do."""
    classes = [value for value in verdict.values if 0 <= value < verdict.num_classes]
    wrong = sorted(verdict.values.keys() - set(classes) - set(verdict.ignore))
    ignored = sum(verdict.values.get(value, 0) for value in verdict.ignore)
    parts = [f"{len(classes)} of {verdict.num_classes} classes occur"]
    if classes:
        parts[0] += f" ({min(classes)} to {max(classes)})"
    parts.append(f"ignored ({', '.join(map(str, verdict.ignore)) or 'none'}) in {ignored:,} label maps")
    if wrong:
        parts.append(f"out of range: {', '.join(map(str, wrong[:_SHOWN]))}")
    return "; ".join(parts)


def _progress(title: str) -> AbstractContextManager[Report]:
    """A bar on a terminal's stderr, a line now and then elsewhere."""
    from rich.console import Console

    from errseg.cli.progress import show_progress

    return show_progress(Console(stderr=True), f"label maps of {title}", lines=True)
