"""Words to look for in noise, and when label maps count as equal."""

from __future__ import annotations

import numpy as np

WORDS = ["red star", "grass", "sky"]


def agree(labels: np.ndarray, expected: np.ndarray) -> bool:
    """Other threads, other rounding."""
    return labels.shape == expected.shape and float((labels == expected).mean()) > 0.999
