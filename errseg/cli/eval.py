"""`errseg eval`: a model's scores on a benchmark or on one's own labelled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from errseg.configs.schema import EvalConfig
    from errseg.eval.runner import Evaluation

_NAMES = {
    "miou": "mIoU (classes in the truth)",
    "miou_union": "mIoU (classes in truth or prediction)",
    "fwiou": "fwIoU",
    "macc": "mACC",
    "pacc": "pACC",
}
_SHOWN = 20  # skipped files, before "and so many more"


def eval(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or one that comes along: ade150-b, ade847-l, pc59-b, pc459-b, pas20-b, pas20b-b, ...",
            show_default=False,
        ),
    ],
    weights: Annotated[str | None, typer.Option(help="model.weights of the configuration.")] = None,
    root: Annotated[str | None, typer.Option(help="data.root: the folder of all sets.")] = None,
    device: Annotated[str | None, typer.Option(help="eval.device: cpu, cuda, cuda:1, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="eval.out: by default errseg-eval/CONFIG.")] = None,
    predictions: Annotated[bool, typer.Option("--predictions", help="Write the predicted label maps too.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting: model.size=640")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what OUT holds of earlier runs.")] = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print every class, too.")] = False,
) -> None:
    """Score a model by the protocol of the published numbers.

    OUT gets result.json, classes.tsv and confusion.safetensors. The same command goes on where it was interrupted.
    Under `torchrun --nproc-per-node N -m errseg eval CONFIG` N processes share the pictures.
    """
    from rich.console import Console

    from errseg.cli.progress import show_progress
    from errseg.configs import find_config, load_config, overrides_of
    from errseg.configs.schema import EvalConfig
    from errseg.eval.report import write
    from errseg.eval.runner import evaluate
    from errseg.scale.processes import joined

    given = {"model.weights": weights, "data.root": root, "eval.device": device, "eval.out": out}
    options = overrides_of(given | {"eval.predictions": predictions or None})

    def read() -> tuple[EvalConfig, Path]:
        path = find_config(config, "eval")
        loaded = load_config(path, EvalConfig, [*options, *(settings or [])])
        return loaded, Path(loaded.eval.out) if loaded.eval.out else Path("errseg-eval") / path.stem

    with joined() as processes:
        loaded, folder = processes.all_or_none(read)
        console = Console(stderr=True, quiet=processes.rank > 0)
        name = "pictures" if processes.count == 1 else f"pictures (process 1 of {processes.count})"
        with show_progress(console, name, lines=True) as report:
            result = evaluate(loaded, folder, processes=processes, restart=restart, progress=report)
        if result is not None:
            write(result, loaded, folder)
            _show(result, loaded, per_class)
            typer.echo(f"written to {folder}")


def _show(result: Evaluation, config: EvalConfig, per_class: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from errseg.eval.report import class_rows

    console = Console()
    if per_class:
        table = Table("class", "IoU", "accuracy", "true pixels")
        for row in class_rows(result):
            scores = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("iou", "accuracy"))
            table.add_row(f"{row['index']} {row['name']}", *scores, f"{row['true_pixels']:,}")
        console.print(table)
    typer.echo(f"{result.data.name}, {result.pictures:,} pictures, {result.settings['model']}")
    table = Table("score", "percent")
    for name, value in result.metrics.summary().items():
        table.add_row(_NAMES[name], f"{value:.2f}")
    if config.eval.published_miou is not None:
        table.add_row("published mIoU", f"{config.eval.published_miou:.1f}")
    console.print(table)
    lines = list(result.skipped.values())
    for line in lines[:_SHOWN]:
        typer.echo(f"skipped: {' '.join(line.split())}", err=True)
    if len(lines) > _SHOWN:
        typer.echo(f"skipped: and {len(lines) - _SHOWN:,} more", err=True)
