"""The pictures of `errseg segment`: read, segmented, saved, counted and reported."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from errseg.data.images import ImageFile
    from errseg.scale.processes import Processes
    from errseg.segmentation import Segmentation
    from errseg.segmenter import Segmenter
    from errseg.vocabulary import Vocabulary


class Jobs:
    """A process's pictures read, segmented and saved side by side; each failure is one line on stderr."""

    def __init__(
        self,
        segmenter: Segmenter,
        out: Path,
        overlay: bool,
        as_json: bool,
        workers: int | None,
        options: dict[str, Any],
        processes: Processes,
    ) -> None:
        from rich.console import Console

        self.segmenter, self.out, self.overlay, self.as_json = segmenter, out, overlay, as_json
        self.workers = processes.workers if workers is None else workers
        self.options, self.processes = options, processes
        self.console = Console(stderr=True)
        self.quiet = Console(stderr=True, quiet=True) if processes.rank else self.console
        self.done = self.failed = self.kept = 0
        self.summed = processes.count == 1
        self.started: float | None = None
        self.seconds: dict[str, float] = {}

    def offer(self, words: Vocabulary) -> None:
        """Encode the words."""
        from errseg.cli.progress import show_progress

        with show_progress(self.quiet, "words") as report:
            self.segmenter.set_vocabulary(words, background=self.options["background"], progress=report)

    def unfinished(self, files: list[ImageFile], words: Vocabulary) -> list[ImageFile]:
        """Pictures whose results for these words are not there yet."""
        from errseg.data.finished import is_finished
        from errseg.segmenter import background_included

        offered = background_included(words.words) if self.options["background"] else words.words
        left = [
            file
            for file in files
            if not is_finished(str(file.path), self._target(file.output), offered, overlay=self.overlay)
        ]
        self.kept = len(files) - len(left)
        return left

    def _target(self, output: str) -> Path:
        return self.out / f"{output}.labels.png"

    def run(self, files: list[ImageFile]) -> None:
        """Segment and save these pictures."""
        from contextlib import closing

        from errseg.cli.progress import show_progress
        from errseg.data.loader import in_order

        self.started = time.perf_counter()
        self.outputs = {str(file.path): file.output for file in files}
        paths = (str(file.path) for file in files)
        results = self.segmenter.stream(paths, workers=self.workers, on_error=self._fail, **self.options)
        # Saving costs as much as reading: overlays are drawn and compressed while the next pictures are segmented.
        saving = in_order(self._save, results, workers=self.workers, ahead=self.workers + 1)
        count = self.processes.count
        name = "pictures" if count == 1 else f"pictures (process 1 of {count})"
        with show_progress(self.quiet, name) as report, closing(saving), closing(results):
            for result, saved in saving:
                try:
                    self._add(result, *saved.result())
                except ErrSegError as error:
                    self._fail(result.source, error)
                report(self.done + self.failed, len(files))

    def add_up(self) -> None:
        """Take the sums of all processes for this one's; waits for all."""
        sums = self.processes.gather((self.done, self.failed, self.seconds))
        self.done = self.failed = 0
        self.seconds = {}
        for done, failed, seconds in sums:
            self.done += done
            self.failed += failed
            self._add_seconds(seconds)
        self.summed = True

    def _save(self, result: Segmentation) -> tuple[list[Path], float]:
        start = time.perf_counter()
        target = self._target(self.outputs[str(result.source)])
        return result.save(target, overlay=self.overlay), time.perf_counter() - start

    def _add(self, result: Segmentation, paths: list[Path], seconds: float) -> None:
        self.done += 1
        self._add_seconds((result.timings or {}) | {"save": seconds})
        if self.as_json:
            self._print_json({"image": result.source, "files": [str(path) for path in paths], "areas": result.areas()})

    def _add_seconds(self, seconds: dict[str, float]) -> None:
        for stage, spent in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def _fail(self, source: Any, error: ErrSegError) -> None:
        self.failed += 1
        line = " ".join(str(error).split())
        text = f"error: {line}" if str(source) in line else f"error: {source}: {line}"
        self.console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        if self.as_json:
            self._print_json({"image": str(source), "error": line})

    def report(self) -> None:
        """What was done, on stdout."""
        if self.started is None:
            return
        elapsed = time.perf_counter() - self.started
        rate = self.done / elapsed
        if self.as_json:
            sums: dict[str, Any] = {"pictures": self.done, "failed": self.failed, "kept": self.kept}
            sums |= {"out": str(self.out)}
            sums |= {"seconds": round(elapsed, 3), "images_per_second": round(rate, 3)}
            sums |= {"processes": self.processes.count} if self.summed else {"process": self.processes.rank}
            self._print_json(sums | ({"timings": dict(self.seconds)} if self.options["timings"] else {}))
            return
        if self.options["timings"]:
            self._print_timings()
        others = f", {self.failed} failed" if self.failed else ""
        others += f", {self.kept} more were there" if self.kept else ""
        speed = f"{elapsed:.3g} s, {rate:.3g} images/s"
        if self.processes.count > 1:
            rank, count = self.processes.rank, self.processes.count
            speed += f", {count} processes" if self.summed else f", process {rank + 1} of {count}"
        typer.echo(f"{self.done} of {self.done + self.failed} pictures segmented into {self.out}{others} ({speed})")

    def _print_timings(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("stage", "seconds", "per picture", title="timings", title_justify="left")
        for stage, seconds in self.seconds.items():
            table.add_row(stage, f"{seconds:.3f}", f"{seconds / max(1, self.done):.3f}")
        Console().print(table)

    def _print_json(self, facts: dict[str, Any]) -> None:
        # File names need not be valid text: what is not becomes a JSON escape.
        line = json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace")
        with _alone() if self.processes.count > 1 else nullcontext():
            typer.echo(line)


@contextmanager
def _alone() -> Iterator[None]:
    """One process of this machine at a time: of several writers a pipe would mix long lines."""
    import fcntl
    import os
    import tempfile

    descriptor = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
