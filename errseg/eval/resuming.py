"""What an earlier run has left of an evaluation: what is still to do, and whether what was done still holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from errseg.configs.schema import EvalConfig
from errseg.data.datasets import LabelledSet, Pair
from errseg.data.labels import label_suffix
from errseg.data.loader import in_order
from errseg.errors import ErrSegError
from errseg.eval.parts import file_digest, joined_parts, load_part, next_run, part_files

PARTS, PREDICTIONS = "parts", "predictions"


def to_do(
    config: EvalConfig, data: LabelledSet, out: Path, key: str, restart: bool, workers: int
) -> tuple[int, list[str]]:
    """Number of this run, and the pictures that no earlier run has counted."""
    folder, number = out / PARTS, len(data.classes)
    if restart:
        _delete(part_files(folder))
        _delete(prediction_path(out / PREDICTIONS, pair.stem, number) for pair in data.pairs)
    done = joined_parts([load_part(path, key) for path in part_files(folder)], number).done
    _check_files([pair for pair in data.pairs if pair.stem in done], done, workers)
    if config.eval.predictions:
        _check_predictions(done, out / PREDICTIONS, number)
    return next_run(folder), [pair.stem for pair in data.pairs if pair.stem not in done]


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ErrSegError(f"cannot delete {path}: {error.strerror or error}") from error


def _check_files(pairs: list[Pair], known: Mapping[str, str], workers: int) -> None:
    """Raise ErrSegError if files have changed since they were counted."""
    with closing(in_order(file_digest, pairs, workers=workers, ahead=4 * workers)) as digests:
        changed = [pair for pair, digest in digests if digest.result() != known[pair.stem]]
    if changed:
        raise ErrSegError(
            f"{changed[0].label} or its picture has changed since it was evaluated ({len(changed)} such pairs): "
            "begin anew with --restart, or choose another folder with --out"
        )


def _check_predictions(done: Iterable[str], folder: Path, number: int) -> None:
    """Raise ErrSegError if predictions are wanted of pictures that were counted without writing theirs."""
    without = [stem for stem in done if not prediction_path(folder, stem, number).is_file()]
    if without:
        raise ErrSegError(
            f"{len(without):,} pictures were evaluated without writing predictions, {min(without)} for one: "
            "begin anew with --restart"
        )


def prediction_path(folder: Path, stem: str, num_classes: int) -> Path:
    """The file of a predicted label map; a stem may have dots."""
    return folder / f"{stem}{label_suffix(num_classes)}"
