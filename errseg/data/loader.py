"""Work done ahead by threads, in order and within bounds: pictures read and resized while others are segmented.

Threads rather than processes: Pillow and NumPy decode and resize outside Python's lock, and a decoded picture, which
the result keeps, need not travel from one process to another.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from errseg.data.images import read_image, to_square

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

MOST_WORKERS = 16


def default_workers() -> int:
    """One per processor core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


class LoadedImage(NamedTuple):
    """A picture, its square [1, 3, S, S] float32 for the model, and the seconds that each took."""

    source: Any
    picture: Image.Image
    square: Tensor
    read_seconds: float
    resize_seconds: float


def load_image(source: Any, size: int, protocol: str | None = None, *, pin: bool = False) -> LoadedImage:
    """Read and resize one picture; `pin` puts the square into memory that a GPU copies from without waiting.

    Raises:
        ErrSegError: as `read_image`.
    """
    start = time.perf_counter()
    picture = read_image(source)
    read = time.perf_counter()
    square = to_square(picture, size, protocol)
    if pin:
        square = square.pin_memory()
    return LoadedImage(source, picture, square, read - start, time.perf_counter() - read)


def in_order(
    work: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int
) -> Generator[tuple[T, Future[R]], None, None]:
    """Yield each item with its finished `work(item)`, in the order of the items.

    Args:
        work: called in one of the worker threads; what it raises, the future raises.
        items: taken one by one, in the caller's thread, never more than `ahead` beyond what was yielded.
        workers: threads; 0 works in the caller's thread, when an item is asked for.
        ahead: items under way or waiting, at least 1.

    Closing the generator, or an exception, waits for the items under way and forgets the others.
    """
    if workers < 1:
        for item in items:
            yield item, _done(work, item)
        return
    waiting: deque[tuple[T, Future[R]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="errseg")
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            while waiting and (len(waiting) >= ahead or waiting[0][1].done()):
                yield _wait(waiting.popleft())
        while waiting:
            yield _wait(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _wait(entry: tuple[T, Future[R]]) -> tuple[T, Future[R]]:
    entry[1].exception()  # waits; the caller asks for the result
    return entry


def _done(work: Callable[[T], R], item: T) -> Future[R]:
    future: Future[R] = Future()
    try:
        future.set_result(work(item))
    except Exception as error:
        future.set_exception(error)
    return future
