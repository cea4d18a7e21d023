"""What is there of a set, what is missing, and which values its labels hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from errseg.data.datasets.benchmarks import Benchmark, Source, Split, datasets_root, find_benchmark
from errseg.data.datasets.index_maps import check_range, label_values, read_index_map
from errseg.data.datasets.labelled import LabelledSet, Pair, list_files, match, open_folder
from errseg.data.images import read_image
from errseg.data.prepare.plans import plan
from errseg.data.prepare.runner import Report, results_of
from errseg.data.prepare.tasks import LookupTask
from errseg.errors import ErrSegError

# Of the label maps that may be left out by rule, where no original tells how many: nearly every picture shows a class.
_LEFT_OUT = 0.05


@dataclass
class Verdict:
    """What was found of a split, or of one's own folder.

    `values` counts in how many label maps each value occurs; `problems` and `missing_sources` are a line each.
    """

    name: str
    images: int
    labels: int
    pairs: int
    expected: tuple[int, ...]  # numbers of labels that are complete; () where any number is
    values: dict[int, int] = field(default_factory=dict)
    ignore: tuple[int, ...] = ()
    num_classes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing_sources: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.problems


class _Check(NamedTuple):
    """What a pair is checked against."""

    num_classes: int
    ignore: int | None
    kind: str | None  # pixels that a benchmark's labels must have


class _Found(NamedTuple):
    values: NDArray[np.int64]
    ignore: int
    line: str = ""


def verify(
    name: str | Benchmark,
    root: str | os.PathLike[str] | None = None,
    *,
    split: str = "val",
    workers: int | None = None,
    progress: Report | None = None,
) -> Verdict:
    """Read every picture and label of a prepared split and compare them with what should be there."""
    benchmark = find_benchmark(name) if isinstance(name, str) else name
    part, base = benchmark.split(split), datasets_root(root)
    images = list_files(base / part.images, [part.image_suffix])
    labels = list_files(base / part.labels, [part.label_suffix])
    pairs = match(images, labels)
    title = f"{benchmark.name} {split}" if len(benchmark.splits) > 1 else benchmark.name
    verdict = Verdict(title, len(images), len(labels), len(pairs), part.counts)
    verdict.num_classes, verdict.ignore = benchmark.num_classes, (benchmark.ignore,)
    lone = sorted(labels.keys() - images.keys())
    if lone:
        lacking = base / part.images / f"{lone[0]}{part.image_suffix}"
        verdict.problems.append(f"{len(lone)} labels without a picture, the first: no {lacking}")
    _check_pairs(verdict, pairs, _Check(benchmark.num_classes, benchmark.ignore, benchmark.kind), workers, progress)
    _compare_with_sources(verdict, benchmark, part, base, labels.keys())
    if verdict.problems:
        verdict.missing_sources = [
            _advice(base, s) for s in _of_split(benchmark, split) if not (base / s.path).exists()
        ]
    return verdict


def verify_folder(
    folder: str | os.PathLike[str], *, workers: int | None = None, progress: Report | None = None
) -> Verdict:
    """The same for one's own `images/`, `labels/` and `classes.txt`."""
    own: LabelledSet = open_folder(folder)
    verdict = Verdict(own.name, len(own), len(own), len(own), ())
    verdict.num_classes = len(own.classes)
    _check_pairs(verdict, own.pairs, _Check(len(own.classes), None, None), workers, progress)
    return verdict


def _check_pairs(
    verdict: Verdict, pairs: Sequence[Pair], check: _Check, workers: int | None, progress: Report | None
) -> None:
    ignored = set(verdict.ignore)
    work: Callable[[Pair], _Found] = partial(_check_pair, check=check)
    with closing(results_of(work, pairs, workers)) as results:
        for done, found in results:
            if found.line:
                verdict.problems.append(found.line)
            else:
                ignored.add(found.ignore)
            for value in found.values.tolist():
                verdict.values[value] = verdict.values.get(value, 0) + 1
            if progress is not None:
                progress(done, len(pairs))
    verdict.ignore = tuple(sorted(ignored))


def _check_pair(pair: Pair, check: _Check) -> _Found:
    """Values of a label map; a line if it or its picture is damaged, or they do not fit each other."""
    values = np.empty(0, np.int64)
    ignore = -1
    try:
        labels = read_index_map(pair.label)
        if check.kind is not None and labels.dtype != np.dtype(check.kind):
            raise ErrSegError(f"{pair.label}: expected pixels of {check.kind}, got {labels.dtype}")
        ignore = int(np.iinfo(labels.dtype).max) if check.ignore is None else check.ignore
        values = label_values(labels)
        check_range(values, check.num_classes, ignore, pair.label)
        picture = read_image(pair.image)
        if (picture.height, picture.width) != labels.shape:
            raise ErrSegError(
                f"{pair.label}: {labels.shape[0]} x {labels.shape[1]} pixels, "
                f"its picture {pair.image.name} is {picture.height} x {picture.width}"
            )
    except ErrSegError as error:
        return _Found(values, ignore, str(error))
    return _Found(values, ignore)


def _compare_with_sources(
    verdict: Verdict, benchmark: Benchmark, part: Split, base: Path, present: Container[str]
) -> None:
    """Name the label maps that the original files call for and that are not there."""
    try:
        todo = plan(benchmark, part, base)
    except ErrSegError as error:
        # Labels that are complete need no original files.
        if verdict.labels not in part.counts:
            count, most = verdict.labels, max(part.counts)
            if part.leaves_out_empty and (1 - _LEFT_OUT) * most <= count < most:
                verdict.notes.append(f"{_shortage(verdict, part)} less those left out by rule (every pixel is ignored)")
            else:
                verdict.problems.append(_shortage(verdict, part))
            verdict.notes.append(str(error))
        return
    missing = [task for task in todo.tasks if task.target.stem not in present]
    left_out = [task for task in missing if isinstance(task, LookupTask) and _is_left_out(task)]
    missing = [task for task in missing if task not in left_out]
    verdict.notes += todo.passed_over
    if left_out:
        verdict.notes.append(f"{len(left_out)} labels are left out by rule: every pixel is ignored")
    if missing:
        verdict.problems.append(f"{len(missing)} labels are not prepared yet, the first: {missing[0].target}")
    elif verdict.labels + len(left_out) not in part.counts:
        verdict.problems.append(_shortage(verdict, part))


def _is_left_out(task: LookupTask) -> bool:
    try:
        return task.leave_out_empty and task.convert() is None
    except ErrSegError:
        return False


def _shortage(verdict: Verdict, part: Split) -> str:
    counts = " or ".join(f"{n:,}" for n in part.counts)
    return f"{verdict.labels:,} labels in {part.labels}, expected {counts}"


def _of_split(benchmark: Benchmark, split: str) -> list[Source]:
    """Sources of a split: those that name another split are not its own."""
    others = [f"{name}2017" for name in benchmark.splits if name != split]
    return [source for source in benchmark.sources if not source.path.endswith(tuple(others))]


def _advice(base: Path, source: Source) -> str:
    return f"{base / source.path}: get {source.where}"
