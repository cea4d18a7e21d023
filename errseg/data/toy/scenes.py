"""Scenes of the toy world: paper cut-outs with soft shadows on one or two textured grounds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from errseg.data.toy.shapes import FIELDS
from errseg.data.toy.textures import Image, Rng, texture_bank
from errseg.data.toy.vocabulary import BACKGROUNDS, COLOURS, SEEN_PAIRS, SHAPES, UNSEEN_PAIRS, word_id

COLOUR_CENTRES = np.array(
    [
        (214, 40, 40),
        (242, 140, 30),
        (245, 225, 60),
        (40, 165, 70),
        (40, 85, 215),
        (140, 60, 175),
        (243, 243, 240),
        (28, 28, 30),
    ],
    dtype=np.float32,
)
_BANK_KEY = 2**32 - 1


class Scene(NamedTuple):
    """One picture, uint8 [S, S, 3] RGB, and its labels, uint8 [S, S], indices into `WORDS`."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


class ToyWorld:
    """A reproducible, endless set of scenes: `world[i]` depends on (seed, size, unseen, i) alone.

    `size` is the side in pixels. `unseen` is the probability that an object comes from the held-out
    (colour, shape) pairs: 0 for training, 0.5 for the test sets.
    """

    def __init__(self, seed: int, *, size: int = 160, unseen: float = 0.0) -> None:
        self.seed, self.size, self.unseen = seed, size, unseen
        self._bank = texture_bank(self._rng(_BANK_KEY), int(1.6 * size))

    def _rng(self, key: int) -> Rng:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(key,)))

    def __getitem__(self, index: int) -> Scene:
        """Scene number `index` (0 <= index < 2**32 - 1)."""
        rng = self._rng(index)
        canvas, labels = self._ground(rng)
        for radius, centre in _placements(rng, self.size):
            pairs = UNSEEN_PAIRS if rng.random() < self.unseen else SEEN_PAIRS
            colour, shape = pairs[rng.integers(len(pairs))]
            _draw_object(rng, canvas, labels, colour, shape, radius, centre)
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(1, 6))
        return Scene((np.clip(canvas, 0, 255) + 0.5).astype(np.uint8), labels)

    def _texture(self, rng: Rng, kind: int) -> Image:
        textures = self._bank[kind]
        texture = textures[rng.integers(len(textures))]
        top, left = rng.integers(0, len(texture) - self.size + 1, 2)
        crop = texture[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return crop * np.float32(rng.uniform(0.85, 1.1)) + rng.uniform(-10, 10, 3).astype(np.float32)

    def _ground(self, rng: Rng) -> tuple[Image, NDArray[np.uint8]]:
        size = self.size
        first, second = rng.choice(len(BACKGROUNDS), 2, replace=False)
        canvas = self._texture(rng, first)
        labels = np.full((size, size), first, dtype=np.uint8)
        if rng.random() < 0.6:
            along = np.arange(size)
            line = size * rng.uniform(0.3, 0.7) + rng.uniform(-0.25, 0.25) * (along - size / 2)
            phase, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.9) * size
            line = line + rng.uniform(1, 6) * np.sin(2 * np.pi * along / period + phase)
            beyond = np.arange(size)[:, None] + 0.5 - line[None, :]  # pixels past the wavy line
            if rng.random() > 0.7:
                beyond = beyond.T
            amount = np.clip(beyond + 0.5, 0, 1).astype(np.float32)[..., None]
            canvas = canvas * (1 - amount) + self._texture(rng, second) * amount
            labels[beyond > 0] = second
        return canvas, labels


def _placements(rng: Rng, size: int) -> list[tuple[float, NDArray[np.float64]]]:
    """Radius and centre (y, x) in pixels of 4 to 7 objects that overlap little; some find no room."""
    placed: list[tuple[float, NDArray[np.float64]]] = []
    for _ in range(rng.integers(4, 8)):
        radius = rng.uniform(0.13, 0.23) * size
        for centre in rng.uniform(0.8 * radius, size - 0.8 * radius, (20, 2)):
            if all(np.hypot(*(centre - other)) >= 0.85 * (radius + r) for r, other in placed):
                placed.append((radius, centre))
                break
    return placed


def _draw_object(
    rng: Rng,
    canvas: Image,
    labels: NDArray[np.uint8],
    colour: int,
    shape: int,
    radius: float,
    centre: NDArray[np.float64],
) -> None:
    size = len(canvas)
    reach = 1.35 * radius
    top, left = np.maximum(np.floor(centre - reach).astype(int), 0)
    bottom, right = np.minimum(np.ceil(centre + reach).astype(int), size)
    y = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - centre[0]))[:, None]
    x = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - centre[1]))[None, :]
    angle, scale = rng.uniform(-0.4, 0.4), rng.uniform(0.85, 1.1, 2)

    def field(dx: float, dy: float) -> Image:
        """Signed distance to the outline in pixels of the shape moved by (dx, dy) radii, y down."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        px, py = (
            (x - np.float32(dx * radius)) / np.float32(radius),
            (np.float32(dy * radius) - y) / np.float32(radius),
        )
        u, v = (px * cos + py * sin) / np.float32(scale[0]), (py * cos - px * sin) / np.float32(scale[1])
        return FIELDS[SHAPES[shape]](u, v) * np.float32(radius * scale.min())

    patch = canvas[top:bottom, left:right]
    shadow = np.clip(field(0.1, 0.12) / np.float32(0.16 * radius) + 0.5, 0, 1)
    patch *= 1 - 0.35 * (shadow * shadow * (3 - 2 * shadow))[..., None]

    base = COLOUR_CENTRES[colour] + rng.uniform(-16, 16, 3).astype(np.float32)
    striped = rng.random() < 0.4
    paint: Image = np.broadcast_to(base, patch.shape)
    if striped:
        amount = _stripes(rng, x, y, radius)[..., None]
        paint = base * (1 - amount) + _second_colour(base, colour) * amount
    shade_y, shade_x = rng.uniform(-0.07, 0.07, 2)
    paint = paint * (1 + np.float32(shade_y / radius) * y + np.float32(shade_x / radius) * x)[..., None]
    inside = np.clip(field(0, 0) + 0.5, 0, 1)
    patch += (paint - patch) * inside[..., None]
    labels[top:bottom, left:right][inside > 0.5] = word_id(int(striped), colour, shape)


def _stripes(rng: Rng, x: Image, y: Image, radius: float) -> Image:
    """Antialiased stripes, 0 or 1, at a random angle of the picture; period 0.32 to 0.5 radii."""
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    frequency = 2 * np.pi / (rng.uniform(0.32, 0.5) * radius)
    wave = np.sin(
        (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) * np.float32(frequency) + np.float32(phase)
    )
    return np.clip(wave / np.float32(frequency) + 0.5, 0, 1)


def _second_colour(base: Image, colour: int) -> Image:
    name = COLOURS[colour]
    if name == "white":
        return base * np.float32(0.62)
    if name == "black":
        return base + np.float32(95)
    return base * np.float32(0.3) + np.float32(255 * 0.7)
