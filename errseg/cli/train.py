"""`errseg train`: the published recipe on a benchmark's training pictures or on one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="A YAML file, or one that comes along: coco-b, coco-l.", show_default=False
        ),
    ],
    weights: Annotated[
        str | None, typer.Option(help="model.weights, to start from: clip, random, or a checkpoint.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="data.root: the folder of all sets.")] = None,
    device: Annotated[str | None, typer.Option(help="train.device: cpu or cuda.")] = None,
    out: Annotated[Path | None, typer.Option(help="train.out: by default errseg-train/CONFIG.")] = None,
    fused: Annotated[
        str | None, typer.Option(metavar="on|off", help="train.fused: off trains in the published order of operations.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting: train.lr=1e-4")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; an earlier run in OUT is kept under another name.")
    ] = False,
) -> None:
    """Train a model by the published recipe.

    The same command goes on from the last checkpoint in OUT, exactly, after an interruption of any kind. OUT/model is
    the result: `errseg eval ... --weights OUT/model`. Under `torchrun --nproc-per-node N -m errseg train CONFIG`
    N processes share every batch.
    """
    from rich.console import Console

    from errseg.cli.progress import show_progress
    from errseg.configs import find_config, load_config, overrides_of
    from errseg.errors import ErrSegError
    from errseg.scale.processes import speaking_for_the_machine
    from errseg.train.settings import TrainConfig
    from errseg.train.trainer import train as run

    with speaking_for_the_machine():
        if fused not in (None, "on", "off"):
            raise ErrSegError(f"--fused: expected on or off, got {fused!r}")
        path = find_config(config, "train")
        given = {"model.weights": weights, "data.root": root, "train.device": device, "train.out": out}
        options = overrides_of(given | {"train.fused": None if fused is None else fused == "on"})
        loaded = load_config(path, TrainConfig, [*options, *(settings or [])])
    folder = Path(loaded.train.out) if loaded.train.out else Path("errseg-train") / path.stem
    first = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True)
    with show_progress(Console(stderr=True, quiet=True) if not first else console, "steps") as report:
        model = run(
            loaded,
            folder,
            restart=restart,
            progress=report,
            note=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    if first:
        typer.echo(f"written to {model}")
