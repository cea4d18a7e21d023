"""The comparers must fail when they should."""

from __future__ import annotations

import math

import pytest
import torch

from errseg.testing.compare import (
    assert_absolutely_close,
    assert_close,
    assert_labels_equal_except_ties,
    assert_within_eager_error,
    error_budget,
    labels_equal_except_ties,
    relative_error,
    rms_error,
)

NAN, INF = math.nan, math.inf


def test_relative_error_is_largest_error_over_largest_entry() -> None:
    expected = torch.tensor([1.0, -4.0, 0.0])
    assert relative_error(torch.tensor([1.5, -4.0, 0.25]), expected) == 0.125
    assert relative_error(expected, expected) == 0.0
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0
    assert relative_error(torch.tensor([True, False]), torch.tensor([1, 1])) == 1.0


def test_rms_error() -> None:
    assert rms_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("error", [relative_error, rms_error])
@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([NAN, 1.0], [0.0, 1.0]),
        ([0.0, 1.0], [NAN, 1.0]),
        ([NAN, 1.0], [NAN, 1.0]),
        ([INF, 1.0], [INF, 1.0]),
        ([INF, 1.0], [0.0, 1.0]),
        ([1e-30], [0.0]),
    ],
)
def test_what_is_not_finite_or_off_zero_is_infinitely_wrong(error, actual, expected) -> None:
    assert error(torch.tensor(actual), torch.tensor(expected)) == INF


@pytest.mark.parametrize("compare", [relative_error, rms_error])
def test_a_wrong_shape_fails_even_if_it_broadcasts(compare) -> None:
    with pytest.raises(AssertionError, match=r"expected shape \[3, 1\], got \[3\]"):
        compare(torch.ones(3), torch.ones(3, 1))


def test_assert_close_quotes_numbers_and_place() -> None:
    expected = torch.full((2, 3), 2.0)
    actual = expected.clone()
    actual[1, 2] += 0.5
    assert_close(actual, expected, 0.25)
    with pytest.raises(
        AssertionError, match=r"logits: relative error 0.25, allowed 0.2; .*\(1, 2\): got 2.5, expected 2"
    ):
        assert_close(actual, expected, 0.2, "logits")


@pytest.mark.parametrize("assertion", [assert_close, assert_absolutely_close])
def test_nan_and_shape_never_pass(assertion) -> None:
    expected = torch.ones(2, 2)
    actual = expected.clone()
    actual[0, 1] = NAN
    with pytest.raises(AssertionError, match="1 of 4 errors are not finite"):
        assertion(actual, expected, INF if assertion is assert_absolutely_close else 1e9)
    with pytest.raises(AssertionError, match="expected shape"):
        assertion(torch.ones(4), expected, INF)


def test_absolute_error() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    assert_absolutely_close(zeros + 1e-13, zeros, 1e-12)
    with pytest.raises(AssertionError, match="absolute error 1e-11, allowed 1e-12"):
        assert_absolutely_close(zeros + 1e-11, zeros, 1e-12)


def bf16_results() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(40, 64).bfloat16(), torch.randn(64, 30).bfloat16()
    return (a @ b) @ b.T, (a.double() @ b.double()) @ b.double().T


def test_budget_passes_eager_itself_and_the_rounded_answer() -> None:
    eager, reference = bf16_results()
    assert_within_eager_error(eager, eager, reference, factor=1.0)
    assert_within_eager_error(reference.bfloat16(), eager, reference, factor=1.0)
    # Where eager happens to be exact, rounding to the precision is still allowed.
    thirds = torch.tensor([1 / 3], dtype=torch.float64)
    exact = thirds.bfloat16().double()
    assert_within_eager_error(thirds.bfloat16(), exact.bfloat16(), thirds, factor=0.0)


def test_budget_fails_a_worse_candidate() -> None:
    eager, reference = bf16_results()
    offset = 3 * (eager.double() - reference).abs().max()
    spoilt = eager.clone()
    spoilt[3, 4] += offset.bfloat16()
    with pytest.raises(AssertionError, match=r"op: over 2 x eager: largest error .* worst at \(3, 4\)"):
        assert_within_eager_error(spoilt, eager, reference, name="op")


def test_budget_fails_a_bias_that_the_maximum_hides() -> None:
    reference = torch.ones(1000, dtype=torch.float64)
    eager = torch.ones(1000)
    eager[0] += 1e-3
    candidate = torch.full((1000,), 1 + 1e-3)
    budget = error_budget(candidate, eager, reference)
    assert budget.candidate <= 2 * budget.eager
    assert budget.exceeded(2)


def test_budget_fails_nan_shapes_and_wrong_yardsticks() -> None:
    eager, reference = bf16_results()
    broken = eager.clone()
    broken[0, 0] = NAN
    with pytest.raises(AssertionError, match="over 2 x eager: largest error inf"):
        assert_within_eager_error(broken, eager, reference)
    with pytest.raises(AssertionError, match="eager result is no yardstick"):
        assert_within_eager_error(eager, broken, reference)
    with pytest.raises(AssertionError, match="expected shape"):
        assert_within_eager_error(eager[:1], eager, reference)
    with pytest.raises(ValueError, match="expected a float64 reference"):
        error_budget(eager, eager, eager)
    with pytest.raises(ValueError, match="one precision"):
        error_budget(eager.float(), eager, reference)


LABELS = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
MARGINS = torch.tensor([[0.5, 0.5], [0.5, 1e-9]])


def test_labels_may_differ_at_ties_only() -> None:
    at_tie, at_sure = LABELS.clone(), LABELS.clone().long()
    at_tie[1, 1] = 0
    at_sure[0, 1] = 9
    assert labels_equal_except_ties(at_tie, LABELS, MARGINS, 1e-6)
    assert not labels_equal_except_ties(at_sure, LABELS, MARGINS, 1e-6)
    with pytest.raises(AssertionError, match=r"1 of 3 sure labels differ; first at \(0, 1\): got 9, expected 2"):
        assert_labels_equal_except_ties(at_sure, LABELS, MARGINS, 1e-6)


def test_labels_fail_on_nan_margins_shapes_floats_and_too_few_sure_ones() -> None:
    wrong = LABELS.clone()
    wrong[1, 1] = 0
    unknown = MARGINS.clone()
    unknown[1, 1] = NAN
    assert not labels_equal_except_ties(wrong, LABELS, unknown, 1e-6)
    with pytest.raises(AssertionError, match="one shape"):
        labels_equal_except_ties(LABELS[None], LABELS, MARGINS, 1e-6)
    with pytest.raises(AssertionError, match="integer labels"):
        labels_equal_except_ties(LABELS.float(), LABELS, MARGINS, 1e-6)
    assert not labels_equal_except_ties(LABELS, LABELS, MARGINS * 0, 1e-6)
    with pytest.raises(AssertionError, match="only 0 of 4 margins exceed"):
        assert_labels_equal_except_ties(LABELS, LABELS, MARGINS * 0, 1e-6)
