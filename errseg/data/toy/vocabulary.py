"""The 168 words of the toy world, and which of them training never shows."""

from __future__ import annotations

BACKGROUNDS = ("grass", "sand", "water", "brick", "wood", "sky", "tiles", "gravel")
PATTERNS = ("", "striped ")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon", "arrow", "flower")

OBJECT_WORDS = tuple(f"{p}{c} {s}" for p in PATTERNS for c in COLOURS for s in SHAPES)
WORDS = BACKGROUNDS + OBJECT_WORDS
"""All 168 words: 8 backgrounds, then 80 plain and 80 striped objects; a label is an index into this tuple."""


def word_id(pattern: int, colour: int, shape: int) -> int:
    """Index into `WORDS` of the object with these indices into `PATTERNS`, `COLOURS` and `SHAPES`."""
    return len(BACKGROUNDS) + (pattern * len(COLOURS) + colour) * len(SHAPES) + shape


def attributes(word: int) -> tuple[int, int, int]:
    """Pattern, colour and shape index of the object word with index `word`; ValueError for a background."""
    index = word - len(BACKGROUNDS)
    if not 0 <= index < len(OBJECT_WORDS):
        raise ValueError(f"expected the index of an object word in [8, 168), got {word}")
    rest, shape = divmod(index, len(SHAPES))
    pattern, colour = divmod(rest, len(COLOURS))
    return pattern, colour, shape


def is_held_out(colour: int, shape: int) -> bool:
    """Whether a (colour, shape) pair is kept out of training: 20 of 80 pairs, two of every shape."""
    return (colour - shape) % 8 in ((1, 6) if shape % 2 == 0 else (0, 3))


SEEN_PAIRS = tuple((c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES)) if not is_held_out(c, s))
UNSEEN_PAIRS = tuple((c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES)) if is_held_out(c, s))

BACKGROUND_IDS = tuple(range(len(BACKGROUNDS)))
SEEN_IDS = tuple(sorted(word_id(p, c, s) for p in range(2) for c, s in SEEN_PAIRS))
UNSEEN_IDS = tuple(sorted(word_id(p, c, s) for p in range(2) for c, s in UNSEEN_PAIRS))
TRAINING_IDS = BACKGROUND_IDS + SEEN_IDS
"""The 128 words of the training vocabulary: backgrounds and seen objects."""

SHAPE_WORDS = BACKGROUNDS + SHAPES
"""Coarse vocabulary by shape, 18 words: "star" instead of "striped red star"."""
COLOUR_WORDS = BACKGROUNDS + tuple(f"{c} thing" for c in COLOURS)
"""Coarse vocabulary by colour, 16 words: "red thing"."""

NEW_COARSE_WORDS = ("star", "red thing")
"""The coarse words that training leaves out: it says "circle" and "blue thing", but never these two."""


def shape_label(word: int) -> int:
    """Index into `SHAPE_WORDS` of the word with index `word` in `WORDS`."""
    return word if word < len(BACKGROUNDS) else len(BACKGROUNDS) + attributes(word)[2]


def colour_label(word: int) -> int:
    """Index into `COLOUR_WORDS` of the word with index `word` in `WORDS`."""
    return word if word < len(BACKGROUNDS) else len(BACKGROUNDS) + attributes(word)[1]


def training_vocabularies() -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Word lists that training offers in turn, each with the index in it of every word of `TRAINING_IDS`.

    The first has the 128 training words; the second calls objects by their shape alone, the third by their colour
    alone, except where that would be one of `NEW_COARSE_WORDS`. Backgrounds always come first.
    """
    lists = [[WORDS[i] for i in TRAINING_IDS]]
    for coarse_words, label in ((SHAPE_WORDS, shape_label), (COLOUR_WORDS, colour_label)):
        names = ((WORDS[i], coarse_words[label(i)]) for i in TRAINING_IDS)
        lists.append([full if coarse in NEW_COARSE_WORDS else coarse for full, coarse in names])
    distinct = [tuple(dict.fromkeys(names)) for names in lists]
    return [(words, tuple(map(words.index, names))) for words, names in zip(distinct, lists, strict=True)]
