"""`errseg demo`: the embedded toy world, segmented by the model that comes with the package."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from errseg.data.toy import Scene
    from errseg.model.errseg import ERRSeg
    from errseg.train.evaluation import Scores

TOLERANCE = 2.0  # points of mIoU between two trainings
_ROWS = (
    ("mIoU, words seen in training", "miou_seen"),
    ("mIoU, words never seen", "miou_unseen"),
    ("mIoU, backgrounds", "miou_backgrounds"),
    ("mIoU, all 168 words", "miou_all"),
    ("pixel accuracy, everywhere", "accuracy_all"),
    ("pixel accuracy, seen objects", "accuracy_seen"),
    ("pixel accuracy, unseen objects", "accuracy_unseen"),
    ("objects named right, seen", "named_seen"),
    ("objects named right, unseen", "named_unseen"),
)
_CAPTIONS = ("Scene", "Truth", "ERR-Seg, 168 words offered", "Argmax of the raw cosines")
_FOOTER = "A toy world. Words with a * occurred in no picture and no text of the training."
_COARSE_CAPTIONS = ("Scene", 'Asked for "star", "ring", ...', 'Asked for "red thing", ...')
_COARSE_FOOTER = (
    'A toy world. The words "star" and "red thing" (with a *) never occurred by themselves in the training.'
)

Report = Callable[[int, int], object]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("errseg-demo"),
    scenes: Annotated[int, typer.Option("--scenes", min=1, help="Fresh scenes to segment and score.")] = 200,
    pictures: Annotated[int, typer.Option("--pictures", min=0, help="How many of them to draw.")] = 6,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which fresh scenes.")] = 777,
    retrain: Annotated[
        bool,
        typer.Option("--retrain", help="Train the toy model again first: about 15 minutes on two cores."),
    ] = False,
) -> None:
    """Segment a toy world with 168 words, 40 of them never seen in training."""
    from rich.console import Console

    console = Console()
    console.print(
        "[bold]This is a toy world[/bold]: drawn scenes, and a tiny model trained on them from nothing."
        " It shows the machinery.\nPhotographs need the published weights:"
        " errseg segment --model errseg-b --weights ...\n"
    )
    started = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ErrSegError(f"cannot make the folder {out}: {error.strerror}") from error
    if retrain:
        _require_accelerate()
    model = _load()
    results = {"shipped": _score(console, model, "shipped weights", scenes, seed)}
    if retrain:
        model = _retrain(console, out / "errseg-tiny.safetensors")
        results["retrained"] = _score(console, model, "new weights", scenes, seed)
    written = _draw(console, model, out, min(pictures, scenes), seed)
    _print_table(console, results, scenes)
    if retrain:
        _compare(console, results)
    if written:
        console.print(f"{len(written)} pictures in {out}{os.sep}: {', '.join(path.name for path in written)}")
    console.print(f"{time.perf_counter() - started:.0f} s in all.")


def _load(weights: Path | None = None) -> ERRSeg:
    import torch

    from errseg.model.errseg import create_model

    return create_model("errseg-tiny", weights).to(memory_format=torch.channels_last)


def _require_accelerate() -> None:
    from errseg.train.loop import make_accelerator

    make_accelerator()


@contextmanager
def _progress(console: Console, *texts: str) -> Iterator[list[Report]]:
    """Progress bars as functions of (done, total)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(text, total=None) for text in texts]
        yield [partial(_update, progress, task) for task in tasks]


def _update(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _score(console: Console, model: ERRSeg, name: str, scenes: int, seed: int) -> dict[str, Scores]:
    from errseg.train.evaluation import evaluate

    with _progress(console, f"Scoring {name}") as (report,):
        return evaluate(model, scenes=scenes, seed=seed, progress=report)


def _retrain(console: Console, path: Path) -> ERRSeg:
    """Train by the shipped recipe, write the weights in fp16, and read them back."""
    import torch

    from errseg.model.errseg import save_model
    from errseg.train.toy import Recipe, train_tiny

    recipe = Recipe()
    with _progress(console, "Drawing scenes", "Training") as (drawing, training):
        model = train_tiny(recipe, on_render=drawing, on_step=lambda step, losses: training(step + 1, recipe.steps))
    save_model(model, path, dtype=torch.float16)
    console.print(f"New weights: {path}")
    return _load(path)


def _draw(console: Console, model: ERRSeg, out: Path, count: int, seed: int) -> list[Path]:
    """Write a picture per scene, one of all of them, and one of three scenes with coarser words."""
    from errseg.data.toy import ToyWorld
    from errseg.data.toy.pictures import grid

    if not count:
        return []
    world = ToyWorld(seed, size=model.config.size, unseen=0.5)
    rows, written = [], []
    with _progress(console, "Drawing pictures") as (report,):
        for index in range(count):
            rows.append(_scene_panels(model, world[index]))
            written.append(_write(grid(_CAPTIONS, rows[-1:], _FOOTER), out / f"scene-{index}.png"))
            report(index + 1, count + 1)
        coarse = [_coarse_panels(model, world[index]) for index in range(min(count, 3))]
        written.append(_write(grid(_CAPTIONS, rows, _FOOTER), out / "scenes.png"))
        written.append(_write(grid(_COARSE_CAPTIONS, coarse, _COARSE_FOOTER), out / "coarse.png"))
        report(count + 1, count + 1)
    return written


def _scene_panels(model: ERRSeg, scene: Scene) -> list[Image]:
    """The scene, its truth, the model's labels and the argmax of the cosines."""
    from errseg.data.toy import WORDS, pictures
    from errseg.train.evaluation import predict, to_tensor

    text = model.clip.embed_words(WORDS, prompt=model.config.prompt)
    shown = pictures.enlarge_image(scene.image)
    prediction = predict(model, to_tensor([scene.image]), text, size=(pictures.PANEL, pictures.PANEL))
    maps = (pictures.enlarge_labels(scene.labels), prediction.head[0], prediction.raw[0])
    return [shown, *(pictures.label_panel(shown, labels) for labels in maps)]


def _coarse_panels(model: ERRSeg, scene: Scene) -> list[Image]:
    """The scene, and its labels by shape alone ("star") and by colour alone ("red thing")."""
    from errseg.data.toy import COLOUR_WORDS, SHAPE_WORDS, pictures
    from errseg.train.evaluation import predict, to_tensor

    shown = pictures.enlarge_image(scene.image)
    panels = [shown]
    for words, names, colors in (
        (SHAPE_WORDS, pictures.SHAPE_NAMES, pictures.SHAPE_WORD_COLOURS),
        (COLOUR_WORDS, pictures.COLOUR_NAMES, pictures.COLOUR_WORD_COLOURS),
    ):
        text = model.clip.embed_words(words, prompt=model.config.prompt)
        prediction = predict(model, to_tensor([scene.image]), text, size=(pictures.PANEL, pictures.PANEL))
        panels.append(pictures.label_panel(shown, prediction.head[0], names, colors))
    return panels


def _write(picture: Image, path: Path) -> Path:
    """Save under a temporary name, then rename, so that no half-written file is left."""
    partial = path.with_name(f".{path.name}.part")
    try:
        picture.save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        raise ErrSegError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _print_table(console: Console, results: dict[str, dict[str, Scores]], scenes: int) -> None:
    from rich.table import Table

    from errseg.train.evaluation import summary

    table = Table(title=f"{scenes} fresh scenes of the toy world, percent", title_justify="left")
    table.add_column("")
    columns = []
    for name, scores in results.items():
        label = f" ({name})" if len(results) > 1 else ""
        for kind, heading in (("head", "ERR-Seg"), ("raw", "raw cosines")):
            table.add_column(heading + label, justify="right")
            columns.append(summary(scores[kind]))
    for title, key in _ROWS:
        table.add_row(title, *(f"{column[key]:.1f}" for column in columns))
    console.print(table)


def _compare(console: Console, results: dict[str, dict[str, Scores]]) -> None:
    from errseg.train.evaluation import summary

    old, new = (summary(results[name]["head"]) for name in ("shipped", "retrained"))
    for title, key in _ROWS[:2]:
        difference = new[key] - old[key]
        verdict = "within" if difference >= -TOLERANCE else "[bold red]NOT within[/bold red]"
        console.print(f"{title}: {difference:+.1f} against the shipped weights, {verdict} {TOLERANCE:.0f} points.")
