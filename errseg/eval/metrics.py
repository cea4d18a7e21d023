"""What the benchmarks report, from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


def confusion_matrix(truth: NDArray[np.integer], prediction: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """Pixel counts [size, size]: row = true class, column = predicted class."""
    pairs = truth.astype(np.int64).ravel() * size + prediction.ravel()
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


@dataclass(frozen=True)
class Metrics:
    """Scores in percent of a confusion matrix [C, C]: rows = truth, columns = prediction, ignored pixels in neither.

    A class that occurs nowhere has no score (NaN), and so has everything where there are no pixels.
    """

    confusion: NDArray[np.int64]

    @cached_property
    def true(self) -> NDArray[np.int64]:
        """Pixels of each class in the truth."""
        return self.confusion.sum(1)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """Pixels of each class in the prediction."""
        return self.confusion.sum(0)

    @cached_property
    def right(self) -> NDArray[np.int64]:
        """Pixels of each class that are predicted right."""
        return np.diag(self.confusion)

    @cached_property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class."""
        return _percent(self.right, self.true + self.predicted - self.right)

    @cached_property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of each class's true pixels that are predicted right."""
        return _percent(self.right, self.true)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that the truth shows (detectron2's rule since July 2022)."""
        return _mean(self.iou[self.true > 0])

    @property
    def miou_union(self) -> float:
        """Mean IoU over the classes that truth or prediction shows (the older rule, of all v0.6 wheels)."""
        return _mean(self.iou[self.true + self.predicted > 0])

    @property
    def fwiou(self) -> float:
        """IoU weighted by each class's share of the true pixels."""
        shown = self.true > 0
        return float((self.iou[shown] * self.true[shown]).sum() / self.true.sum()) if shown.any() else float("nan")

    @property
    def macc(self) -> float:
        """Mean accuracy over the classes that the truth shows."""
        return _mean(self.accuracy[self.true > 0])

    @property
    def pacc(self) -> float:
        """Share of all pixels that are predicted right."""
        return float(_percent(self.right.sum(), self.true.sum()))

    def summary(self) -> dict[str, float]:
        """All scores of the whole set, by name."""
        return {name: getattr(self, name) for name in ("miou", "miou_union", "fwiou", "macc", "pacc")}


def _percent(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    whole = np.asarray(whole, np.float64)
    return 100 * np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
