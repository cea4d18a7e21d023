"""How far a long command is: a bar with rate and remaining time on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task
    from rich.text import Text

LINE_SECONDS = 30.0  # between two lines where there is no terminal


class Report(Protocol):
    """Takes (done, in all); what was done at the first call counts as done before."""

    def __call__(self, done: int, total: int) -> None: ...


@contextmanager
def show_progress(console: Console, name: str, *, lines: bool = False) -> Iterator[Report]:
    """Yield a `Report` for so many `name` ("words", "pictures") shown on `console`.

    `lines` prints a line every half minute where the console is no terminal; else nothing appears there.
    """
    if console.is_terminal:
        with _bar(console, name) as report:
            yield report
    else:
        yield _Lines(console, name) if lines else (lambda done, total: None)


@contextmanager
def _bar(console: Console, name: str) -> Iterator[Report]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{format_rate(task.speed)} {name}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self.first: int | None = None
        self.start = self.last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.first is None:
            self.first, self.start, self.last = done, now, now
        if now - self.last < LINE_SECONDS or done == self.first:
            return
        self.last = now
        rate = (done - self.first) / (now - self.start)
        left = format_seconds((total - done) / rate)
        text = f"{done:,} of {total:,} {self.name}, {format_rate(rate)} {self.name}/s, {left} left"
        self.console.print(text, highlight=False, soft_wrap=True)


def format_rate(rate: float) -> str:
    """A number a second with about three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def format_seconds(seconds: float) -> str:
    """42 s, 3 min, 1 h 20 min."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
