"""A procedurally drawn toy world whose words compose ("striped blue ring"); numpy only."""

from errseg.data.toy.scenes import Scene, ToyWorld
from errseg.data.toy.vocabulary import (
    BACKGROUND_IDS,
    COLOUR_WORDS,
    NEW_COARSE_WORDS,
    SEEN_IDS,
    SHAPE_WORDS,
    TRAINING_IDS,
    UNSEEN_IDS,
    WORDS,
    attributes,
    colour_label,
    shape_label,
    training_vocabularies,
)

__all__ = [
    "BACKGROUND_IDS",
    "COLOUR_WORDS",
    "NEW_COARSE_WORDS",
    "SEEN_IDS",
    "SHAPE_WORDS",
    "TRAINING_IDS",
    "UNSEEN_IDS",
    "WORDS",
    "Scene",
    "ToyWorld",
    "attributes",
    "colour_label",
    "shape_label",
    "training_vocabularies",
]
