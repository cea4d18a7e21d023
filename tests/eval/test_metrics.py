"""Scores against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from errseg.eval.metrics import Metrics, confusion_matrix
from errseg.eval.runner import _Counts

# Truth and prediction of ten pixels; -1 is ignored. Class 3 occurs nowhere, 4 in the prediction only, 2 in the truth
# only, and class 5 is predicted on an ignored pixel only, which does not count.
TRUTH = np.array([[0, 0, 0, 0, 1], [1, 1, 2, -1, -1]])
PREDICTION = np.array([[0, 0, 0, 1, 1], [1, 4, 0, 5, 0]])
CONFUSION = np.zeros((6, 6), np.int64)
CONFUSION[0, 0], CONFUSION[0, 1], CONFUSION[1, 1], CONFUSION[1, 4], CONFUSION[2, 0] = 3, 1, 2, 1, 1


def counted(truth: np.ndarray, prediction: np.ndarray, size: int, batch: int = 1) -> np.ndarray:
    counts = _Counts(size, range(size), torch.device("cpu"))
    for _ in range(batch):
        counts.add(torch.from_numpy(prediction.astype(np.int32)), truth)
    return counts.numpy()


def test_matrix_by_hand() -> None:
    assert counted(TRUTH, PREDICTION, 6).tolist() == CONFUSION.tolist()
    assert counted(TRUTH, PREDICTION, 6, batch=3).tolist() == (3 * CONFUSION).tolist()
    assert counted(TRUTH, PREDICTION, 6).dtype == np.int64


def test_scores_by_hand() -> None:
    metrics = Metrics(CONFUSION)
    # Class 0: 3 right of 4 true and 4 predicted; class 1: 2 of 3 and 3; class 2: none of 1; class 4: none of 1.
    assert metrics.iou[:3] == pytest.approx([100 * 3 / 5, 100 * 2 / 4, 0])
    assert np.isnan(metrics.iou[3]) and metrics.iou[4] == 0 and np.isnan(metrics.iou[5])
    assert metrics.accuracy[:3] == pytest.approx([75, 200 / 3, 0]) and np.isnan(metrics.accuracy[3:]).all()
    assert metrics.summary() == pytest.approx(
        {
            "miou": (60 + 50 + 0) / 3,  # classes 0, 1, 2
            "miou_union": (60 + 50 + 0 + 0) / 4,  # class 4 too
            "fwiou": (60 * 4 + 50 * 3 + 0) / 8,
            "macc": (75 + 200 / 3 + 0) / 3,
            "pacc": 100 * 5 / 8,
        }
    )


def test_a_matrix_without_pixels_has_no_scores() -> None:
    assert all(np.isnan(value) for value in Metrics(np.zeros((3, 3), np.int64)).summary().values())


def test_torchmetrics_counts_as_numpy_does() -> None:
    generator = np.random.default_rng(0)
    truth, prediction = generator.integers(-1, 40, (2, 50, 60))
    prediction = np.maximum(prediction, 0)
    seen = truth >= 0
    assert (counted(truth, prediction, 40) == confusion_matrix(truth[seen], prediction[seen], 40)).all()


def test_words_that_count_as_background() -> None:
    counts = _Counts(3, [0, 1, 2, 2, 2], torch.device("cpu"))
    predicted = counts.classes(torch.tensor([[0, 3, 4, 2]], dtype=torch.int32))
    counts.add(predicted, np.array([[0, 2, 1, -1]]))
    assert predicted.tolist() == [[0, 2, 2, 2]]
    assert counts.numpy().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
