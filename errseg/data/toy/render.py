"""Many scenes at once, drawn by several processes; numpy only, so that those processes start quickly."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from errseg.data.toy.scenes import ToyWorld

_CHUNK = 128

Pictures = NDArray[np.uint8]


def render_scenes(
    seed: int,
    count: int,
    size: int,
    *,
    processes: int = 2,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Pictures, Pictures]:
    """Draw scenes 0 to count - 1 of the training world: images [N, S, S, 3] and labels [N, S, S], both uint8.

    Labels index `WORDS`. `progress(done, count)` is called as scenes finish. The result does not depend on
    `processes`; 1 draws in this process.
    """
    if processes == 1:
        world = ToyWorld(seed, size=size)
        scenes = [world[index] for index in range(count)]
        return np.stack([scene.image for scene in scenes]), np.stack([scene.labels for scene in scenes])
    with tempfile.TemporaryDirectory(prefix="errseg-scenes-") as folder:
        images = np.lib.format.open_memmap(Path(folder, "images.npy"), "w+", np.uint8, (count, size, size, 3))
        labels = np.lib.format.open_memmap(Path(folder, "labels.npy"), "w+", np.uint8, (count, size, size))
        # Spawned, not forked: the parent may hold PyTorch's thread pool.
        with ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=_start_worker, initargs=(seed, size, folder)
        ) as pool:
            starts = range(0, count, _CHUNK)
            jobs = [pool.submit(_draw_chunk, start, min(start + _CHUNK, count)) for start in starts]
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                if progress is not None:
                    progress(min(done * _CHUNK, count), count)
        return np.array(images), np.array(labels)


_worker: tuple[ToyWorld, Pictures, Pictures] | None = None


def _start_worker(seed: int, size: int, folder: str) -> None:
    global _worker
    images, labels = (np.load(Path(folder, f"{name}.npy"), mmap_mode="r+") for name in ("images", "labels"))
    _worker = ToyWorld(seed, size=size), images, labels


def _draw_chunk(start: int, stop: int) -> None:
    assert _worker is not None
    world, images, labels = _worker
    for index in range(start, stop):
        images[index], labels[index] = world[index]
