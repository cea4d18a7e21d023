"""The verdicts themselves: what counts as an error, as a proven tie, as an open vote."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.testing.samples import Sizes, sample
from errseg.verify import checks
from errseg.verify.checks import compare_errors, compare_labels, compare_votes, vote_bounds


def passed(found: list[checks.Check]) -> bool:
    return all(check.passed for check in found)


def test_twice_the_error_of_eager_is_the_limit() -> None:
    truth = torch.linspace(1, 2, 101, dtype=torch.float64)
    eager = (truth * (1 + 1e-6)).float()
    assert passed(compare_errors("x", (truth * (1 - 1.8e-6)).float(), eager, truth))
    assert not passed(compare_errors("x", (truth * (1 - 2.4e-6)).float(), eager, truth))
    assert passed(compare_errors("x", truth.float(), truth.float(), truth))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_fails(value: float) -> None:
    truth = torch.ones(3, dtype=torch.float64)
    broken = torch.tensor([1.0, value, 1.0])
    assert not passed(compare_errors("x", broken, torch.ones(3), truth))
    assert not passed(compare_errors("x", torch.full((3,), value), torch.ones(3), 0 * truth, scale=1.0))


def test_shapes_and_dtypes_are_checked() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    for wrong in (torch.ones(4), torch.ones(3).half(), [1.0, 1.0, 1.0]):
        (check,) = compare_errors("x", wrong, torch.ones(3), truth)  # type: ignore[arg-type]
        assert not check.passed and "expected" in check.note


def test_what_cancels_is_compared_absolutely() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    noise = torch.full((4,), 1e-9)
    assert passed(compare_errors("x", torch.zeros(4), noise, zero, scale=1.0))
    assert not passed(compare_errors("x", torch.full((4,), 1e-3), noise, zero, scale=1.0))


def test_further_draws_excuse_bad_luck_only() -> None:
    truth = torch.ones(8, dtype=torch.float64)
    off = {size: (truth * (1 + size)).float() for size in (1e-7, 1e-6, 1e-3)}
    calm = tuple((off[1e-6], truth) for _ in range(5))
    lucky = compare_errors("x", off[1e-6], off[1e-7], truth, leniency=checks.Leniency(eager=calm))
    assert passed(lucky) and not passed(compare_errors("x", off[1e-6], off[1e-7], truth))
    often_right = checks.Leniency(eager=calm, results=calm)
    assert not passed(compare_errors("x", off[1e-3], off[1e-7], truth, leniency=often_right))


# ---- votes


def call_of(**sizes: int) -> tuple[Tensor, Tensor]:
    images, words = sample("class_votes", Sizes(**sizes), seed=1).to(torch.float32).args
    return images, words


def test_random_votes_leave_no_room() -> None:
    images, words = call_of(words=60, text=64)
    lowest, highest, unsure = vote_bounds(images, words)
    assert torch.equal(lowest, highest) and unsure == 0
    assert torch.equal(lowest, ops.class_votes(images, words, backend="reference"))


def test_equal_words_rank_the_lowest_id_first() -> None:
    images, words = call_of(words=20, text=32)
    votes = ops.class_votes(images, words.repeat(2, 1), backend="reference")
    assert compare_votes(votes, images, words.repeat(2, 1)).passed
    swapped = torch.cat((votes[:, 20:], votes[:, :20]), 1)
    assert not compare_votes(swapped, images, words.repeat(2, 1)).passed


def test_only_cosines_within_rounding_are_open() -> None:
    images = torch.tensor([1.0, 1.0]).view(1, 2, 1, 1)
    angles = torch.tensor([0.1, 0.1 + 1e-8, 0.5, 1.2], dtype=torch.float64)
    words = torch.stack((angles.cos(), angles.sin()), 1)
    lowest, highest, unsure = vote_bounds(images.double(), words)
    assert torch.equal(lowest, highest) and unsure == 0  # float64 tells them apart
    nearly = torch.tensor([[1.0, 0.0], [1.0, 1e-9], [0.0, -1.0], [-1.0, -1.0]])
    lowest, highest, unsure = vote_bounds(images, nearly)
    assert unsure == 1
    assert lowest.tolist() == [[10, 10, 1, 0]] and highest.tolist() == [[100, 100, 1, 0]]


def test_votes_must_add_up() -> None:
    images, words = call_of(words=60, text=64)
    votes = ops.class_votes(images, words, backend="reference")
    assert compare_votes(votes, images, words).passed
    missing = votes.clone()
    missing[0, votes[0].argmax()] -= 1
    assert not compare_votes(missing, images, words).passed
    assert not compare_votes(votes.int(), images, words).passed


# ---- labels


def labels_of(logits: Tensor, ids: Tensor, size: tuple[int, int] = (13, 17)) -> Tensor:
    labels = ops.upsample_argmax(logits.double(), ids, size, backend="reference")
    assert isinstance(labels, Tensor)
    return labels


def test_a_label_within_rounding_of_the_best_is_a_tie() -> None:
    ids = torch.tensor([[2, 5]])
    logits = torch.zeros(1, 2, 3, 4)
    logits[:, 1] = 1e-7  # a lead of 2.5e-8 in probability: below float32
    truth = labels_of(logits, ids)
    assert truth.unique().tolist() == [5]
    assert compare_labels(torch.full_like(truth, 2), truth, logits, ids).passed
    logits[:, 1] = 1e-4
    assert not compare_labels(torch.full_like(truth, 2), labels_of(logits, ids), logits, ids).passed
    assert not compare_labels(torch.full_like(truth, 3), truth, logits, ids).passed  # no selected class


def test_of_equal_maps_the_lowest_id_wins() -> None:
    ids = torch.tensor([[2, 5, 7]])
    logits = torch.randn(1, 1, 3, 4).repeat(1, 3, 1, 1)
    truth = labels_of(logits, ids)
    assert truth.unique().tolist() == [2]
    check = compare_labels(torch.full_like(truth, 5), truth, logits, ids)
    assert check.error == truth.numel() and "instead of 2" in check.note
    assert compare_labels(torch.full_like(truth, 5), truth, logits, ids, twins=False).passed


def test_saturated_probabilities_tie() -> None:
    ids = torch.tensor([[2, 5]])
    logits = torch.tensor([20.0, 30.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4).contiguous()
    truth = labels_of(logits, ids)
    assert truth.unique().tolist() == [5]  # float64 sees the difference
    assert compare_labels(torch.full_like(truth, 2), truth, logits, ids).passed
