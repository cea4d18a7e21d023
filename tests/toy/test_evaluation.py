"""Scores by hand, and the shipped weights on a few fresh scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from errseg.data import toy
from errseg.errors import ErrSegError
from errseg.eval.metrics import confusion_matrix
from errseg.model.errseg import ASSETS, ERRSeg, create_model
from errseg.train.evaluation import Scores, evaluate, predict, summary, to_tensor


@pytest.fixture(scope="module")
def shipped() -> ERRSeg:
    return create_model("errseg-tiny").to(memory_format=torch.channels_last)


def test_scores_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2])
    prediction = np.array([0, 0, 1, 1, 3, 2])
    confusion = confusion_matrix(truth, prediction, 4)
    assert confusion.sum() == 6 and confusion[1, 3] == 1
    scores = Scores(confusion, np.array([[1, 1], [0, 2], [1, 1], [0, 0]]))
    assert scores.miou(range(4)) == pytest.approx(100 * (2 / 3 + 1 / 3 + 1) / 3)  # class 3 is not in the truth
    assert scores.pixel_accuracy([0, 1]) == pytest.approx(60)
    assert scores.objects_named([0, 1]) == pytest.approx(100 / 3)


def test_shipped_weights_name_seen_and_unseen_words(shipped: ERRSeg) -> None:
    scores = evaluate(shipped, scenes=4)
    head, raw = summary(scores["head"]), summary(scores["raw"])
    assert head["accuracy_all"] > 94 and head["miou_backgrounds"] > 90
    assert head["accuracy_seen"] > 85 and head["accuracy_unseen"] > 80
    assert head["accuracy_objects"] > raw["accuracy_objects"] + 10


def test_shipped_weights_answer_coarser_words(shipped: ERRSeg) -> None:
    world = toy.ToyWorld(777, unseen=0.5)
    scenes = [world[i] for i in range(8)]
    images = to_tensor([scene.image for scene in scenes])
    cases = ((toy.SHAPE_WORDS, toy.shape_label, "star"), (toy.COLOUR_WORDS, toy.colour_label, "red thing"))
    for words, coarse, new in cases:
        table = np.array([coarse(i) for i in range(len(toy.WORDS))])
        truth = np.stack([table[scene.labels] for scene in scenes])
        text = shipped.clip.embed_words(words, prompt=shipped.config.prompt)
        right = predict(shipped, images, text).head == truth
        assert right.mean() > 0.93 and right[truth >= 8].mean() > 0.85
        assert new in toy.NEW_COARSE_WORDS and right[truth == words.index(new)].mean() > 0.7


def test_shipped_file_is_small_and_complete() -> None:
    path = Path(ASSETS, "errseg-tiny.safetensors")
    assert path.stat().st_size < 6_000_000
    model = create_model("errseg-tiny")
    assert model.config.clip.text.token_ids is not None and len(model.config.clip.text.token_ids) == 36
    assert sum(p.numel() for p in model.parameters()) < 2_200_000


def test_an_unknown_word_is_an_error_that_lists_the_known_ones(shipped: ERRSeg) -> None:
    with pytest.raises(ErrSegError, match=r"giraffe.*star"):
        shipped.clip.embed_words(["red giraffe"], prompt=shipped.config.prompt)
