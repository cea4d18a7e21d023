"""The ten shapes as implicit functions of (u, v): positive inside, about a signed distance in radii, v up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
Shape = Callable[[Field, Field], Field]


def _circle(u: Field, v: Field) -> Field:
    return 0.88 - np.hypot(u, v)


def _square(u: Field, v: Field) -> Field:
    return 0.76 - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: Field, v: Field) -> Field:
    v = v + 0.12
    slanted = 0.49 - (np.abs(u) * np.float32(np.cos(np.pi / 6)) + v * 0.5)
    return np.minimum(slanted, v + 0.49)


def _star(u: Field, v: Field, points: int = 5, inner: float = 0.42) -> Field:
    # Fold into the half sector from a point (angle 0) to the next notch: one straight edge.
    sector = np.pi / points
    angle = np.arctan2(u, v)
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    radius = np.hypot(u, v)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    edge = np.array([inner * np.cos(sector) - 1, inner * np.sin(sector)], dtype=np.float32)
    normal = np.array([edge[1], -edge[0]]) / np.hypot(edge[0], edge[1])
    return (1 - along) * normal[0] - across * normal[1]


def _ring(u: Field, v: Field) -> Field:
    return 0.23 - np.abs(np.hypot(u, v) - 0.68)


def _cross(u: Field, v: Field) -> Field:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(0.88 - a, 0.29 - b), np.minimum(0.29 - a, 0.88 - b))


def _heart(u: Field, v: Field, half: float = 0.56) -> Field:
    v = v + 0.15
    side = 0.5**0.5
    p, q = (u + v) * side, (v - u) * side  # the square's own axes: +p is up right, +q is up left
    square = half - np.maximum(np.abs(p), np.abs(q))
    right = half - np.hypot(p - half, q)
    left = half - np.hypot(p, q - half)
    return np.maximum(square, np.maximum(left, right))


def _moon(u: Field, v: Field) -> Field:
    return np.minimum(0.9 - np.hypot(u, v), np.hypot(u - 0.45, v - 0.1) - 0.68)


def _arrow(u: Field, v: Field) -> Field:
    # Head: a triangle with its tip at (.95, 0) and its base from (.1, -.68) to (.1, .68).
    slope = np.hypot(0.85, 0.68)
    head = np.minimum(((0.95 - u) * 0.68 - np.abs(v) * 0.85) / slope, u - 0.1)
    shaft = np.minimum(0.25 - np.abs(v), np.minimum(u + 0.9, 0.3 - u))
    return np.maximum(head, shaft)


def _flower(u: Field, v: Field) -> Field:
    radius = np.hypot(u, v)
    petals = 0.66 + 0.26 * np.cos(5 * np.arctan2(u, v)) - radius
    return np.minimum(petals, radius - 0.17)


FIELDS: dict[str, Shape] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
    "arrow": _arrow,
    "flower": _flower,
}
