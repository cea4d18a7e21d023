"""Tasks shared out to threads, each failure one line, nothing done twice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from errseg.data.loader import default_workers, in_order
from errseg.data.prepare.tasks import Task
from errseg.errors import ErrSegError

Report = Callable[[int, int], object]
_T = TypeVar("_T")
_R = TypeVar("_R")
_AHEAD = 8  # items per thread under way or waiting to be counted


class Outcome(NamedTuple):
    """What became of a task: "written", "kept", "left out", "failed", or "stop" where nothing can be written."""

    state: str
    line: str = ""


@dataclass
class Summary:
    """How many label maps were written, kept and left out; what failed, a line each."""

    written: int = 0
    kept: int = 0
    left_out: int = 0
    failed: list[str] = field(default_factory=list)


def run_task(task: Task, overwrite: bool) -> Outcome:
    """Run one task unless its files are there and good."""
    try:
        if not overwrite and task.done():
            return Outcome("kept")
        return Outcome("written" if task.run() else "left out")
    except ErrSegError as error:
        # What cannot be written now cannot be written for the next picture either.
        return Outcome("stop" if str(error).startswith("cannot write") else "failed", str(error))


def run_tasks(
    tasks: Sequence[Task], *, workers: int | None = None, overwrite: bool = False, progress: Report | None = None
) -> Summary:
    """Run all tasks; files that are there and good are kept unless `overwrite`.

    `progress(done, total)` is called after each. A failed task is a line in the summary and the rest goes on.

    Raises:
        ErrSegError: a file cannot be written (a full disk, say), which stops everything at once.
    """
    summary = Summary()
    work: Callable[[Task], Outcome] = partial(run_task, overwrite=overwrite)
    with closing(results_of(work, tasks, workers)) as outcomes:
        for done, outcome in outcomes:
            if outcome.state == "stop":
                raise ErrSegError(f"{outcome.line}; stopped after {done - 1} of {len(tasks)}, run it again to go on")
            if outcome.state == "failed":
                summary.failed.append(outcome.line)
            summary.written += outcome.state == "written"
            summary.kept += outcome.state == "kept"
            summary.left_out += outcome.state == "left out"
            if progress is not None:
                progress(done, len(tasks))
    return summary


def results_of(
    work: Callable[[_T], _R], items: Sequence[_T], workers: int | None
) -> Generator[tuple[int, _R], None, None]:
    """Yield (number from 1, result) of each item, in order, worked on by so many threads (None: by cores).

    Threads do, since Pillow and numpy work outside Python's lock, and none outlives this process, however it ends.
    """
    wanted = default_workers() if workers is None else workers
    if wanted < 1:
        raise ErrSegError(f"workers: expected at least 1, got {workers}")
    with closing(in_order(work, items, workers=wanted, ahead=_AHEAD * wanted)) as finished:
        for number, (_, future) in enumerate(finished, 1):
            yield number, future.result()
