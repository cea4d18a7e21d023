"""The colour jitter of SSD (arXiv 1512.02325) on 8-bit pictures: each step clips to 0..255 and truncates.

torchvision's ColorJitter works in other units, other orders and other roundings, so it is not this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

BRIGHTNESS = 32.0  # most that is added
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # most that is added, in OpenCV's units of 2 degrees
_HUES = 180


@dataclass(frozen=True)
class Jitter:
    """One draw; None leaves a step out. Contrast comes before saturation and hue, or after both."""

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: int | None = None
    contrast_first: bool = True

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Jitter:
        """Each step, and contrast first, with probability 0.5; amounts uniform over their ranges."""
        wanted = rng.random(5) < 0.5
        values = (rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(*CONTRAST), rng.uniform(*SATURATION))
        hue = int(rng.integers(-HUE, HUE + 1))
        brightness, contrast, saturation = (v if w else None for v, w in zip(values, wanted[:3], strict=True))
        return cls(brightness, contrast, saturation, hue if wanted[3] else None, bool(wanted[4]))

    def apply(self, picture: Picture) -> Picture:
        """The changed picture, uint8 [H, W, 3] RGB."""
        if self.brightness is not None:
            picture = _linear(1.0, self.brightness)[picture]
        if self.contrast is not None and self.contrast_first:
            picture = _linear(self.contrast, 0.0)[picture]
        picture = self._saturate_and_turn(picture)
        if self.contrast is not None and not self.contrast_first:
            picture = _linear(self.contrast, 0.0)[picture]
        return picture

    def _saturate_and_turn(self, picture: Picture) -> Picture:
        """Saturation, then hue, each by way of 8-bit HSV, as published."""
        if self.saturation is not None:
            hsv = rgb_to_hsv(picture)
            hsv[..., 1] = _linear(self.saturation, 0.0)[hsv[..., 1]]
            picture = hsv_to_rgb(hsv)
        if self.hue is not None:
            hsv = rgb_to_hsv(picture)
            hsv[..., 0] = (hsv[..., 0].astype(np.int32) + self.hue) % _HUES
            picture = hsv_to_rgb(hsv)
        return picture


def _linear(factor: float, offset: float) -> Picture:
    """What becomes of each of the 256 values: scaled, shifted, clipped, truncated."""
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(values, 0, 255).astype(np.uint8)


# OpenCV's 8-bit HSV, to which the published recipe goes, in whole numbers: its own way back rounds differently from
# one processor to the next, and from one column of a picture to another.
_BITS = 12
_DIVISORS = np.maximum(np.arange(256), 1)
_SATURATIONS = np.rint((255 << _BITS) / _DIVISORS).astype(np.int32)
_TURNS = np.rint((_HUES << _BITS) / (6 * _DIVISORS)).astype(np.int32)


def rgb_to_hsv(picture: Picture) -> Picture:
    """uint8 [..., 3] RGB to hue 0..179 (2 degrees each), saturation and value 0..255; bit for bit OpenCV's."""
    red, green, blue = (picture[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    span = value - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_BITS - 1)
    turn = np.where(value == green, blue - red + 2 * span, red - green + 4 * span)
    turn = np.where(value == red, green - blue, turn)
    hue = (turn * _TURNS[span] + half) >> _BITS
    hue[hue < 0] += _HUES
    return np.stack([hue, (span * _SATURATIONS[value] + half) >> _BITS, value], axis=-1).astype(np.uint8)


_SECTOR = _HUES // 6
_FULL = 255 * _SECTOR
# How much of the saturation is missing in red, green and blue at each hue, in parts of a sector.
_MISSING = [
    np.clip(np.minimum(turn, 4 * _SECTOR - turn), 0, _SECTOR).astype(np.int32)
    for turn in ((first * _SECTOR + np.arange(_HUES)) % _HUES for first in (5, 3, 1))
]


def hsv_to_rgb(picture: Picture) -> Picture:
    """The way back, truncated; within one level of OpenCV's."""
    hue, saturation, value = picture[..., 0], picture[..., 1].astype(np.int32), picture[..., 2].astype(np.int32)
    channels = [value * (_FULL - saturation * missing[hue]) // _FULL for missing in _MISSING]
    return np.stack(channels, axis=-1).astype(np.uint8)
