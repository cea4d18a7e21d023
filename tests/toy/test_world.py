"""The toy world: its words, its held-out rule, its scenes."""

from __future__ import annotations

import numpy as np
import pytest

from errseg.data import toy
from errseg.data.toy.shapes import FIELDS
from errseg.data.toy.vocabulary import BACKGROUNDS, COLOURS, SEEN_PAIRS, SHAPES, UNSEEN_PAIRS, word_id


def test_vocabulary_has_168_distinct_words() -> None:
    assert len(toy.WORDS) == len(set(toy.WORDS)) == 168
    assert toy.WORDS[:8] == BACKGROUNDS
    assert toy.WORDS[word_id(0, COLOURS.index("red"), SHAPES.index("star"))] == "red star"
    assert toy.WORDS[word_id(1, COLOURS.index("blue"), SHAPES.index("ring"))] == "striped blue ring"


def test_attributes_invert_word_id() -> None:
    for word in range(8, 168):
        assert word_id(*toy.attributes(word)) == word
    with pytest.raises(ValueError, match="got 3"):
        toy.attributes(3)


def test_held_out_pairs() -> None:
    assert len(UNSEEN_PAIRS) == 20 and len(SEEN_PAIRS) == 60
    for shape in range(len(SHAPES)):
        assert sum(s == shape for _, s in UNSEEN_PAIRS) == 2
    for colour in range(len(COLOURS)):
        assert 2 <= sum(c == colour for c, _ in UNSEEN_PAIRS) <= 4


def test_training_and_unseen_words_are_disjoint_and_complete() -> None:
    assert len(toy.TRAINING_IDS) == 128 and len(toy.UNSEEN_IDS) == 40 and len(toy.SEEN_IDS) == 120
    assert not set(toy.TRAINING_IDS) & set(toy.UNSEEN_IDS)
    assert sorted(toy.TRAINING_IDS + toy.UNSEEN_IDS) == list(range(168))


def test_training_texts_never_have_an_unseen_word() -> None:
    vocabularies = toy.training_vocabularies()
    assert len(vocabularies[0][0]) == 128
    texts = {word for words, _ in vocabularies for word in words}
    assert not texts & {toy.WORDS[i] for i in toy.UNSEEN_IDS}
    assert not texts & set(toy.NEW_COARSE_WORDS)
    assert {"circle", "blue thing", "red circle", "yellow star"} <= texts
    for words, indices in vocabularies:
        assert words[:8] == BACKGROUNDS and len(indices) == 128
        assert set(indices) == set(range(len(words)))


def test_coarse_labels() -> None:
    word = toy.WORDS.index("striped red star")
    assert toy.SHAPE_WORDS[toy.shape_label(word)] == "star"
    assert toy.COLOUR_WORDS[toy.colour_label(word)] == "red thing"
    assert toy.SHAPE_WORDS[toy.shape_label(2)] == toy.COLOUR_WORDS[toy.colour_label(2)] == "water"


def test_scenes_are_deterministic_and_independent_of_order() -> None:
    world = toy.ToyWorld(3, size=96)
    first, second = world[0], world[1]
    again = toy.ToyWorld(3, size=96)
    for expected, got in ((second, again[1]), (first, again[0])):
        np.testing.assert_array_equal(expected.image, got.image)
        np.testing.assert_array_equal(expected.labels, got.labels)
    assert not np.array_equal(first.image, toy.ToyWorld(4, size=96)[0].image)


def test_scene_types_and_sizes() -> None:
    scene = toy.ToyWorld(0, size=72)[5]
    assert scene.image.shape == (72, 72, 3) and scene.image.dtype == np.uint8
    assert scene.labels.shape == (72, 72) and scene.labels.dtype == np.uint8


def test_training_scenes_never_show_an_unseen_word() -> None:
    world = toy.ToyWorld(0, size=64)
    shown = np.unique(np.stack([world[i].labels for i in range(150)]))
    assert not set(shown.tolist()) & set(toy.UNSEEN_IDS)
    assert len(set(shown.tolist()) & set(toy.SEEN_IDS)) > 100  # and show most of the others


def test_test_scenes_show_both() -> None:
    world = toy.ToyWorld(777, size=64, unseen=0.5)
    shown = set(np.unique(np.stack([world[i].labels for i in range(100)])).tolist())
    assert len(shown & set(toy.UNSEEN_IDS)) >= 35 and len(shown & set(toy.SEEN_IDS)) >= 60


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_a_fair_part_of_their_circle(shape: str) -> None:
    v, u = np.mgrid[1.3:-1.3:261j, -1.3:1.3:261j].astype(np.float32)
    inside = FIELDS[shape](u, v) > 0
    area = inside.mean() * 2.6**2
    assert 0.7 < area < 2.5
    assert not inside[np.hypot(u, v) > 1.1].any()


def test_shapes_have_their_points() -> None:
    def inside(shape: str, u: float, v: float) -> bool:
        return bool(FIELDS[shape](np.float32([u]), np.float32([v]))[0] > 0)

    for k in range(5):  # five star points near radius 1, notches at 0.42
        tip, notch = 2 * np.pi * k / 5, 2 * np.pi * (k + 0.5) / 5
        assert inside("star", 0.97 * np.sin(tip), 0.97 * np.cos(tip))
        assert inside("star", 0.40 * np.sin(notch), 0.40 * np.cos(notch))
        assert not inside("star", 0.45 * np.sin(notch), 0.45 * np.cos(notch))
    assert inside("arrow", 0.93, 0) and inside("arrow", -0.88, 0.2) and inside("arrow", 0.12, 0.6)
    assert not inside("arrow", 0, 0.5) and not inside("arrow", 0.6, 0.4)
    assert inside("moon", -0.8, 0) and not inside("moon", 0.3, 0)
    assert not inside("flower", 0, 0) and not inside("ring", 0, 0)


def test_labels_follow_the_painted_colours() -> None:
    """Objects that are not striped are painted near their colour's centre under their label."""
    from errseg.data.toy.scenes import COLOUR_CENTRES

    world = toy.ToyWorld(1, size=128)
    errors = []
    for index in range(12):
        image, labels = world[index]
        for word in np.unique(labels[labels >= 8]).tolist():
            pattern, colour, _ = toy.attributes(word)
            if pattern == 0 and (labels == word).sum() > 200:
                errors.append(np.abs(np.median(image[labels == word], 0) - COLOUR_CENTRES[colour]).max())
    assert len(errors) > 15 and max(errors) < 45


def test_two_grounds_and_shadows_stay_background() -> None:
    world = toy.ToyWorld(2, size=96)
    grounds = [len(np.unique(world[i].labels[world[i].labels < 8])) for i in range(40)]
    assert set(grounds) == {1, 2} and 12 <= grounds.count(2) <= 34
