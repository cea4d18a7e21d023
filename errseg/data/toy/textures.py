"""The eight backgrounds of the toy world: procedural RGB textures, 0..255 float32 [size, size, 3]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errseg.data.toy.vocabulary import BACKGROUNDS

Image = NDArray[np.floating[Any]]
Rng = np.random.Generator


def _bilinear_weights(size: int, cell: float) -> Image:
    position = np.arange(size) / cell
    weights = np.zeros((size, int(position[-1]) + 2), dtype=np.float32)
    rows, left = np.arange(size), position.astype(int)
    weights[rows, left] = 1 - (position - left)
    weights[rows, left + 1] += position - left
    return weights


def value_noise(rng: Rng, size: int, cell_y: float, cell_x: float | None = None) -> Image:
    """Smooth noise [size, size] of about unit variance: Gaussians every `cell` pixels, bilinear between."""
    rows = _bilinear_weights(size, cell_y)
    columns = _bilinear_weights(size, cell_x or cell_y)
    grid = rng.standard_normal((rows.shape[1], columns.shape[1]), dtype=np.float32)
    return rows @ grid @ columns.T


def _tinted(base: tuple[float, float, float], tone: Image, tint: tuple[float, float, float] = (1, 1, 1)) -> Image:
    return np.asarray(base, dtype=np.float32) + tone[..., None] * np.asarray(tint, dtype=np.float32)


def _grid(size: int) -> tuple[Image, Image]:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return y, x


def _grass(rng: Rng, size: int) -> Image:
    blades = value_noise(rng, size, 7, 1.6) * 15 + value_noise(rng, size, 4, 1.2) * 9
    patches = value_noise(rng, size, 30) * 9
    return _tinted((104, 158, 62), blades + patches, (0.75, 1, 0.55))


def _sand(rng: Rng, size: int) -> Image:
    y, x = _grid(size)
    warp = value_noise(rng, size, 36) * 5
    ripples = np.sin((y + 0.25 * x + warp) * (2 * np.pi / rng.uniform(11, 15))) * 7
    grain = rng.standard_normal((size, size), dtype=np.float32) * 6 + value_noise(rng, size, 3) * 4
    return _tinted((226, 201, 148), ripples + grain, (1, 0.95, 0.8))


def _water(rng: Rng, size: int) -> Image:
    y, x = _grid(size)
    warp = value_noise(rng, size, 14, 26) * 3.5
    waves = np.sin((y + warp) * (2 * np.pi / rng.uniform(9, 12)) + x * 0.02)
    glints = np.clip(waves - 0.45, 0, 1) * (0.6 + 0.4 * value_noise(rng, size, 6, 18))
    tone = waves * 7 + value_noise(rng, size, 40) * 6
    return _tinted((64, 146, 178), tone, (0.8, 1, 1)) + 95 * np.clip(glints, 0, 1)[..., None]


def _courses(rng: Rng, size: int, height: int, width: int, shift: float) -> tuple[Image, Image, Image]:
    """Rows of blocks, every other one shifted: pixels to the nearest joint, tone of the block, row index."""
    y, x = _grid(size)
    y, x = y + rng.uniform(0, height), x + rng.uniform(0, width)
    row = np.floor(y / height)
    along = x + (row % 2) * shift * width
    column = np.floor(along / width)
    down, across = y - row * height, along - column * width
    joint = np.minimum(np.minimum(down, height - down), np.minimum(across, width - across))
    tones = rng.standard_normal((size // height + 3, size // width + 4), dtype=np.float32)
    return joint, tones[row.astype(int), column.astype(int)], row


def _brick(rng: Rng, size: int) -> Image:
    joint, tone, _ = _courses(rng, size, 13, 30, 0.5)
    rough = value_noise(rng, size, 2) * 6 + value_noise(rng, size, 9) * 5
    bricks = _tinted((172, 88, 66), tone * 15 + rough, (1, 0.8, 0.7))
    mortar = _tinted((208, 198, 184), rough)
    amount = np.clip(joint - 0.6, 0, 1)[..., None]
    return bricks * amount + mortar * (1 - amount)


def _wood(rng: Rng, size: int) -> Image:
    joint, tone, row = _courses(rng, size, 24, 118, 0.43)
    y, _ = _grid(size)
    warp = value_noise(rng, size, 12, 60) * 4 + row * 7.3
    grain = np.sin((y + warp) * (2 * np.pi / 5.5)) * 6 + value_noise(rng, size, 1.5, 22) * 8
    planks = _tinted((168, 118, 72), tone * 12 + grain, (1, 0.85, 0.65))
    return planks * (0.45 + 0.55 * np.clip(joint - 0.2, 0, 1))[..., None]


def _sky(rng: Rng, size: int) -> Image:
    y, _ = _grid(size)
    clouds = (
        value_noise(rng, size, 26, 46) + 0.5 * value_noise(rng, size, 12, 22) + 0.25 * value_noise(rng, size, 6, 10)
    )
    amount = np.clip(clouds * 0.55 - 0.05, 0, 0.85)[..., None]
    blue = _tinted((132, 188, 238), 26 * y / size, (1.2, 0.8, 0.3))
    return blue * (1 - amount) + np.float32(246) * amount


def _tiles(rng: Rng, size: int) -> Image:
    joint, tone, _ = _courses(rng, size, 22, 22, 0)
    glaze = value_noise(rng, size, 16) * 4
    tiles = _tinted((158, 196, 188), tone * 9 + glaze) + 14 * np.clip(2.6 - joint, 0, 1)[..., None]
    amount = np.clip(joint - 0.5, 0, 1)[..., None]
    return tiles * amount + np.asarray((108, 122, 122), dtype=np.float32) * (1 - amount)


def _gravel(rng: Rng, size: int, cell: int = 8) -> Image:
    # Worley cells: nearest and second nearest of one jittered point per grid cell, of 3x3 cells around.
    count = size // cell + 3
    jitter = rng.uniform(0.1, 0.9, (count, count, 2)).astype(np.float32)
    tones = rng.standard_normal((count, count), dtype=np.float32)
    y, x = _grid(size)
    row, column = (y // cell).astype(int) + 1, (x // cell).astype(int) + 1
    nearest = np.full((size, size), np.inf, dtype=np.float32)
    second, tone = nearest.copy(), np.zeros_like(nearest)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            point = jitter[row + i, column + j]
            distance = np.hypot(
                y - (row + i - 1 + point[..., 0]) * cell, x - (column + j - 1 + point[..., 1]) * cell
            ).astype(np.float32)
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            tone = np.where(closer, tones[row + i, column + j], tone)
            nearest = np.where(closer, distance, nearest)
    edge = np.clip((second - nearest) / 2.2, 0, 1)
    stones = _tinted(
        (152, 146, 140), tone * 22 + rng.standard_normal((size, size), dtype=np.float32) * 4, (1, 0.98, 0.94)
    )
    return stones * (0.5 + 0.5 * edge)[..., None]


_PAINTERS: dict[str, Callable[[Rng, int], Image]] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "brick": _brick,
    "wood": _wood,
    "sky": _sky,
    "tiles": _tiles,
    "gravel": _gravel,
}


def texture_bank(rng: Rng, size: int, count: int = 6) -> Image:
    """`count` textures per background in the order of `BACKGROUNDS`: [8, count, size, size, 3], 0..255."""
    return np.stack([np.stack([_PAINTERS[name](rng, size) for _ in range(count)]) for name in BACKGROUNDS])
