"""Augmentation: the colour jitter against a loop over pixels, resizing, cropping, mirroring and padding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from errseg.train.augment import IGNORED, PADDING, Augmentation
from errseg.train.colour import Jitter, hsv_to_rgb, rgb_to_hsv

PLAIN = {"short_edge": 32, "max_edge": 1333, "colour_jitter": False, "flip": False}


def clip(value: float) -> int:
    """To 0..255, then truncated."""
    return int(min(max(value, 0.0), 255.0))


def to_hsv(r: int, g: int, b: int) -> tuple[int, int, int]:
    """OpenCV's 8-bit HSV: hue in steps of 2 degrees, fixed-point with 12 bits."""
    v, low = max(r, g, b), min(r, g, b)
    span = v - low
    s = (span * (round((255 << 12) / v) if v else 0) + 2048) >> 12
    if v == r:
        turn = g - b
    elif v == g:
        turn = b - r + 2 * span
    else:
        turn = r - g + 4 * span
    h = (turn * (round((180 << 12) / (6 * span)) if span else 0) + 2048) >> 12
    return h + 180 if h < 0 else h, s, v


def to_rgb(h: int, s: int, v: int) -> tuple[int, int, int]:
    """Back, by the sectors of the hexagon, in exact fractions, truncated."""
    sector, rest = divmod(h, 30)
    part, saturation = Fraction(rest, 30), Fraction(s, 255)
    p, q, t = v * (1 - saturation), v * (1 - saturation * part), v * (1 - saturation * (1 - part))
    red, green, blue = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)][sector]
    return int(red), int(green), int(blue)


def one_pixel(jitter: Jitter, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """The published jitter of one pixel."""

    def scale(pixel: tuple[int, int, int]) -> tuple[int, int, int]:
        if jitter.contrast is None:
            return pixel
        r, g, b = (clip(float(np.float32(v) * np.float32(jitter.contrast))) for v in pixel)
        return r, g, b

    if jitter.brightness is not None:
        r, g, b = (clip(float(np.float32(v) + np.float32(jitter.brightness))) for v in rgb)
        rgb = r, g, b
    if jitter.contrast_first:
        rgb = scale(rgb)
    if jitter.saturation is not None:
        h, s, v = to_hsv(*rgb)
        rgb = to_rgb(h, clip(float(np.float32(s) * np.float32(jitter.saturation))), v)
    if jitter.hue is not None:
        h, s, v = to_hsv(*rgb)
        rgb = to_rgb((h + jitter.hue) % 180, s, v)
    return rgb if jitter.contrast_first else scale(rgb)


@pytest.mark.parametrize(
    "jitter",
    [
        Jitter(),
        Jitter(brightness=-31.7),
        Jitter(brightness=12.5, contrast=1.37),
        Jitter(saturation=0.61),
        Jitter(hue=-18),
        Jitter(brightness=20.25, contrast=0.5, saturation=1.5, hue=17),
        Jitter(brightness=-8.0, contrast=1.5, saturation=1.21, hue=5, contrast_first=False),
    ],
)
def test_colour_jitter_equals_a_loop_over_pixels(jitter: Jitter) -> None:
    rng = np.random.default_rng(5)
    picture = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture[0, :8] = [
        [0, 0, 0],
        [255, 255, 255],
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [9, 9, 8],
        [1, 0, 0],
        [7, 7, 7],
    ]
    expected = [[one_pixel(jitter, tuple(map(int, pixel))) for pixel in row] for row in picture]
    assert np.array_equal(jitter.apply(picture), np.array(expected, np.uint8))


def test_colour_jitter_is_drawn_as_published() -> None:
    rng = np.random.default_rng(0)
    draws = [Jitter.draw(rng) for _ in range(4000)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 18),
    ):
        values = [value for draw in draws if (value := getattr(draw, name)) is not None]
        assert 1800 < len(values) < 2200 and min(values) >= low and max(values) <= high
        assert min(values) < low + 0.05 * (high - low) and max(values) > high - 0.05 * (high - low)
    assert {draw.hue for draw in draws} == {None, *range(-18, 19)}
    assert 1800 < sum(draw.contrast_first for draw in draws) < 2200


def test_hsv_is_opencvs() -> None:
    cv2 = pytest.importorskip("cv2")
    picture = np.random.default_rng(2).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    hsv = rgb_to_hsv(picture)
    assert np.array_equal(hsv, cv2.cvtColor(picture, cv2.COLOR_RGB2HSV))
    back = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(int)
    assert np.abs(hsv_to_rgb(hsv) - back).max() <= 1


def test_picture_and_labels_are_resized_as_published() -> None:
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (45, 67, 3), dtype=np.uint8))
    labels = rng.integers(-1, 200, (45, 67))
    image, target = Augmentation(64, **PLAIN)(picture, labels, np.random.default_rng(0))
    width = int(32 / 45 * 67 + 0.5)
    assert np.array_equal(image[:, :32, :width], np.asarray(picture.resize((width, 32), 2)).transpose(2, 0, 1))
    rows, columns = (np.floor(np.arange(n) * np.float32(m / n)).astype(int) for n, m in ((32, 45), (width, 67)))
    assert np.array_equal(target[:32, :width], labels[rows][:, columns])
    assert (image[:, 32:] == PADDING).all() and (image[:, :, width:] == PADDING).all()
    assert (target[32:] == IGNORED).all() and (target[:, width:] == IGNORED).all()


def test_crops_and_mirrors_keep_picture_and_labels_together() -> None:
    rows, columns = np.mgrid[:40, :40]
    picture = Image.fromarray(np.stack([rows, columns, rows], -1).astype(np.uint8))
    crop = Augmentation(24, short_edge=40, max_edge=1333, colour_jitter=False, flip=True)
    corners, mirrored = set(), 0
    for seed in range(300):
        image, target = crop(picture, rows * 40 + columns, np.random.default_rng(seed))
        assert (image[0].int() * 40 + image[1].int() == target).all()
        mirrored += bool(image[1, 0, 0] > image[1, 0, 1])
        corners.add((int(image[0].min()), int(image[1].min())))
    assert 110 < mirrored < 190
    assert {top for top, _ in corners} == {left for _, left in corners} == set(range(17))
