"""Pictures of what a model sees in a toy scene: panels side by side, names on the regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from errseg.data.overlay import draw_overlay
from errseg.data.toy.scenes import COLOUR_CENTRES
from errseg.data.toy.vocabulary import (
    BACKGROUNDS,
    COLOUR_WORDS,
    NEW_COARSE_WORDS,
    SHAPE_WORDS,
    SHAPES,
    UNSEEN_IDS,
    WORDS,
    attributes,
)

PANEL = 480  # pixels, side of a panel

_GROUND_COLOURS = {
    "grass": (104, 158, 62),
    "sand": (226, 201, 148),
    "water": (64, 146, 178),
    "brick": (172, 88, 66),
    "wood": (150, 104, 62),
    "sky": (160, 204, 240),
    "tiles": (158, 196, 188),
    "gravel": (146, 140, 134),
}
_SHAPE_COLOURS = (
    (31, 119, 180),
    (255, 127, 14),
    (120, 190, 60),
    (250, 210, 50),
    (148, 103, 189),
    (140, 86, 75),
    (214, 39, 40),
    (240, 150, 200),
    (60, 60, 70),
    (23, 190, 207),
)
_INK, _FAINT_INK, _PAPER = (30, 30, 34), (96, 96, 102), (255, 255, 255)
_GAP, _BAND = 10, 34

NAMES = tuple(f"{word} *" if i in UNSEEN_IDS else word for i, word in enumerate(WORDS))
"""The 168 words, those that training never showed marked with a star."""


def _natural_colour(word: int) -> NDArray[np.float64]:
    if word < len(BACKGROUNDS):
        return np.array(_GROUND_COLOURS[BACKGROUNDS[word]], dtype=np.float64)
    pattern, colour, shape = attributes(word)
    base = COLOUR_CENTRES[colour] * (0.86 + 0.14 * shape / (len(SHAPES) - 1))
    return base if not pattern else base * 0.55 + 0.45 * (255 if base.mean() < 200 else 90)


SHAPE_NAMES, COLOUR_NAMES = (
    tuple(f"{word} *" if word in NEW_COARSE_WORDS else word for word in words) for words in (SHAPE_WORDS, COLOUR_WORDS)
)
"""The same for the coarse vocabularies."""

NATURAL_COLOURS = np.stack([_natural_colour(i) for i in range(len(WORDS))]).astype(np.uint8)
"""A colour per word [168, 3] that looks like what the word means; striped is paler."""
_GROUNDS = NATURAL_COLOURS[: len(BACKGROUNDS)]
COLOUR_WORD_COLOURS = np.concatenate([_GROUNDS, COLOUR_CENTRES.astype(np.uint8)])
"""The same for `COLOUR_WORDS`."""
SHAPE_WORD_COLOURS = np.concatenate([_GROUNDS, np.array(_SHAPE_COLOURS, dtype=np.uint8)])
"""For `SHAPE_WORDS`: shapes have no colour of their own, so they get one each."""


def enlarge_image(image: NDArray[np.uint8]) -> Image.Image:
    """A picture [S, S, 3] at panel size."""
    return Image.fromarray(image).resize((PANEL, PANEL), Image.Resampling.BICUBIC)


def enlarge_labels(labels: NDArray[np.integer]) -> NDArray[np.int32]:
    """A label map at panel size with smooth outlines: every class enlarged bilinearly, the largest wins."""
    shown = np.unique(labels)
    layers = [_enlarge_mask(labels == word) for word in shown]
    return shown[np.argmax(np.stack(layers), 0)].astype(np.int32)


def _enlarge_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    large = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize((PANEL, PANEL), Image.Resampling.BILINEAR)
    return np.asarray(large.filter(ImageFilter.GaussianBlur(PANEL / 220)))


def label_panel(
    scene: Image.Image,
    labels: NDArray[np.integer],
    names: Sequence[str] = NAMES,
    colors: NDArray[np.uint8] | None = NATURAL_COLOURS,
) -> Image.Image:
    """A label map at the scene's size painted over it, every region named."""
    return draw_overlay(scene, labels, names, alpha=0.82, colors=colors)


def grid(captions: Sequence[str], rows: Sequence[Sequence[Image.Image]], footer: str) -> Image.Image:
    """Rows of square panels of one size, a caption over every column and a line of text below."""
    side = rows[0][0].width
    step = side + _GAP
    sheet = Image.new("RGB", (_GAP + len(captions) * step, _BAND + len(rows) * step - _GAP + _BAND), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        draw.text((_GAP + column * step, _BAND // 2), caption, _INK, ImageFont.load_default(20), anchor="lm")
    for i, row in enumerate(rows):
        for column, panel in enumerate(row):
            sheet.paste(panel, (_GAP + column * step, _BAND + i * step))
    draw.text((_GAP, sheet.height - _BAND // 2), footer, _FAINT_INK, ImageFont.load_default(17), anchor="lm")
    return sheet
