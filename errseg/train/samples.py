"""The endless sequence of training samples, a pure function of seed and position: resuming is starting later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from errseg.data.datasets import LabelledSet, Pair
from errseg.data.images import read_image
from errseg.errors import ErrSegError
from errseg.train.augment import IGNORED, Augmentation
from errseg.train.stopping import end_with_parent_alone

_ATTEMPTS = 20  # files in a row that cannot be read, before it is given up
_ORDER, _SAMPLE, _SUBSTITUTE = range(3)  # what the random numbers are for


class Sample(NamedTuple):
    """Image uint8 [3, S, S] and target int32 [S, S], -1 ignored; or why there is none (`fatal`).

    `skipped` are the faults of files for which this one stands in.
    """

    image: Tensor | None
    target: Tensor | None
    skipped: tuple[str, ...] = ()
    fatal: str | None = None


class Batch(NamedTuple):
    """Images uint8 [B, 3, S, S], targets int32 [B, S, S], and the faults of skipped files."""

    images: Tensor
    targets: Tensor
    skipped: tuple[str, ...]
    fatal: str | None = None


class TrainingSamples(Dataset[Sample]):
    """Sample number p: picture p mod N of a fresh shuffle per round, augmented with random numbers of its own.

    Nothing but (seed, p) matters: not the process that reads it, nor what was read before.
    """

    def __init__(self, data: LabelledSet, augmentation: Augmentation, *, seed: int, skip: bool) -> None:
        self.data, self.augmentation, self.seed, self.skip = data, augmentation, seed, skip

    def __getitem__(self, position: int) -> Sample:
        """Faults are values, so that they cross from a reading process as one line."""
        skipped: list[str] = []
        for attempt in range(_ATTEMPTS):
            pair = self.data.pairs[self._index(position, attempt)]
            try:
                image, target = self.augmentation(*self._read(pair), self._rng(_SAMPLE, position))
                return Sample(image, target, tuple(skipped))
            except ErrSegError as error:
                if not self.skip:
                    return Sample(None, None, fatal=str(error))
                skipped.append(str(error))
        return Sample(None, None, fatal=f"{_ATTEMPTS} files in a row cannot be used, the last one: {skipped[-1]}")

    def _read(self, pair: Pair) -> tuple[Image.Image, NDArray[np.int64]]:
        picture, labels = read_image(pair.image), self.data.labels(pair)
        if labels.shape != (picture.height, picture.width):
            raise ErrSegError(
                f"{pair.label}: {labels.shape[0]} x {labels.shape[1]} pixels, "
                f"its picture {picture.height} x {picture.width}"
            )
        return picture, labels

    def _index(self, position: int, attempt: int) -> int:
        """Which picture; another one, at random, after one that cannot be read."""
        count = len(self.data)
        if attempt:
            return int(self._rng(_SUBSTITUTE, position, attempt).integers(count))
        return int(_shuffle(self.seed, position // count, count)[position % count])

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))


@lru_cache(maxsize=2)
def _shuffle(seed: int, round_: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, _ORDER, round_)).permutation(count)


class Positions:
    """Per part of each step from `start` to `stop`, the sample numbers of process `rank` of `count`.

    Step s takes the samples from s * batch_size on, shared out in the same way by any number of processes, so that
    two processes compute what one does.
    """

    def __init__(self, start: int, stop: int, *, batch_size: int, parts: int, rank: int, count: int) -> None:
        self.steps, self.batch_size, self.parts, self.rank, self.count = (
            range(start, stop),
            batch_size,
            parts,
            rank,
            count,
        )

    def __len__(self) -> int:
        return len(self.steps) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // (self.parts * self.count)
        for step in self.steps:
            for part in range(self.parts):
                first = step * self.batch_size + (part * self.count + self.rank) * size
                yield list(range(first, first + size))


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as one batch, the first fatal fault instead of pictures."""
    skipped = tuple(line for sample in samples for line in sample.skipped)
    fatal = next((sample.fatal for sample in samples if sample.fatal is not None), None)
    if fatal is not None:
        return Batch(torch.empty(0), torch.empty(0), skipped, fatal)
    images = torch.stack([sample.image for sample in samples if sample.image is not None])
    targets = torch.stack([sample.target for sample in samples if sample.target is not None])
    return Batch(images, targets, skipped)


def num_labelled(batch: Batch) -> int:
    """Pixels of a batch that are not ignored."""
    return int((batch.targets != IGNORED).sum())


def make_loader(samples: TrainingSamples, positions: Positions, *, workers: int, pin: bool) -> DataLoader[Any]:
    """Batches in order, read ahead by `workers` processes (0: none)."""
    return DataLoader(
        samples,
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its seeds are not used, and the network's random numbers stay untouched
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    end_with_parent_alone()
