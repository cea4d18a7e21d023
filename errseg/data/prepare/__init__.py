"""Label maps of the benchmarks from their original files, in the layouts of the published code bases."""

from __future__ import annotations

import os

from errseg.data.datasets.benchmarks import Benchmark, datasets_root, find_benchmark
from errseg.data.prepare.plans import plan
from errseg.data.prepare.runner import Report, Summary, run_tasks
from errseg.errors import ErrSegError

__all__ = ["Summary", "prepare"]


def prepare(
    name: str | Benchmark,
    root: str | os.PathLike[str] | None = None,
    *,
    split: str = "val",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> tuple[Summary, list[str]]:
    """Write the label maps (for ADE-847 the pictures too) of a split; return a summary and what was passed over.

    Files that are there and good are kept, so that an interrupted run goes on where it was.

    Args:
        name: a benchmark.
        root: folder of all sets, by default `datasets_root()`.
        split: "val", or "train" where there is one.
        workers: threads; None is one per core, at most 16.
        overwrite: write everything anew.
        progress: called as `progress(done, total)`.

    Raises:
        ErrSegError: original files are missing (with where to get them), or nothing can be written.
    """
    benchmark = find_benchmark(name) if isinstance(name, str) else name
    part, base = benchmark.split(split), datasets_root(root)
    if not base.is_dir():
        raise ErrSegError(f"{base}: no such folder; it holds the folders of all sets")
    todo = plan(benchmark, part, base)
    for folder in (*todo.folders, base / part.labels):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ErrSegError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    summary = run_tasks(todo.tasks, workers=workers, overwrite=overwrite, progress=progress)
    return summary, todo.passed_over
