"""Comparers that quote numbers when they fail; NaN, infinity and a wrong shape always fail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _difference(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """|actual - expected| and expected, float64 on the CPU; AssertionError unless the shapes agree."""
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {list(expected.shape)}, got {list(actual.shape)}")
    wanted = expected.detach().to("cpu", torch.float64)
    return (actual.detach().to("cpu", torch.float64) - wanted).abs(), wanted


def _ratio(error: float, scale: float) -> float:
    if not math.isfinite(error) or not math.isfinite(scale):
        return math.inf
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest entry of `expected`; infinite when anything is not finite.

    Empty tensors agree (0.0); raises AssertionError when the shapes differ.
    """
    error, wanted = _difference(actual, expected)
    if error.numel() == 0:
        return 0.0
    return _ratio(error.max().item(), wanted.abs().max().item())


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square error over root mean square of `expected`; rules as in `relative_error`."""
    error, wanted = _difference(actual, expected)
    if error.numel() == 0:
        return 0.0
    return _ratio(error.square().mean().sqrt().item(), wanted.square().mean().sqrt().item())


def _worst(actual: Tensor, expected: Tensor) -> str:
    """Where the largest error is, and what stands there."""
    error, wanted = _difference(actual, expected)
    bad = (~error.isfinite()).sum().item()
    place = torch.unravel_index(error.nan_to_num(nan=math.inf).argmax(), error.shape)
    index = tuple(int(axis) for axis in place)
    got = actual.detach().to("cpu", torch.float64)[index].item()
    note = f"; {bad} of {error.numel()} errors are not finite" if bad else ""
    return f"worst at {index}: got {got:.9g}, expected {wanted[index].item():.9g}{note}"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    """Fails when the largest error over the largest entry exceeds `tolerance`, or is not a number."""
    error = relative_error(actual, expected)
    if not error <= tolerance:
        worst = _worst(actual, expected)
        raise AssertionError(f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}; {worst}")


def assert_absolutely_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    """Fails when the largest error exceeds `tolerance` or is not a number: for values that should be zero."""
    error, _ = _difference(actual, expected)
    largest = error.max().item() if error.numel() else 0.0
    if not largest <= tolerance:
        worst = _worst(actual, expected)
        raise AssertionError(f"{name}: absolute error {largest:.3g}, allowed {tolerance:.3g}; {worst}")


@dataclass(frozen=True)
class ErrorBudget:
    """Errors of a candidate and of eager code in one precision, both against a float64 reference."""

    candidate: float  # largest error over largest entry
    eager: float
    candidate_rms: float  # root mean square error over root mean square
    eager_rms: float
    rounding: float  # half a unit in the last place: what writing the exact answer may cost

    def exceeded(self, factor: float) -> bool:
        """Whether the candidate errs more than `factor` times eager, in the maximum or in the mean."""
        return not (
            self.candidate <= max(factor * self.eager, self.rounding)
            and self.candidate_rms <= max(factor * self.eager_rms, self.rounding)
        )

    def __str__(self) -> str:
        return (
            f"largest error {self.candidate:.3g} (eager {self.eager:.3g}), "
            f"rms {self.candidate_rms:.3g} (eager {self.eager_rms:.3g}), rounding {self.rounding:.3g}"
        )


def error_budget(candidate: Tensor, eager: Tensor, reference: Tensor) -> ErrorBudget:
    """Errors of a candidate and an eager result of one dtype against float64 of the same rounded inputs.

    Raises ValueError for other dtypes, AssertionError when a shape differs or eager is not finite.
    """
    if reference.dtype != torch.float64:
        raise ValueError(f"expected a float64 reference, got {reference.dtype}")
    if candidate.dtype != eager.dtype or not candidate.is_floating_point():
        raise ValueError(f"expected two results of one precision, got {candidate.dtype} and {eager.dtype}")
    budget = ErrorBudget(
        candidate=relative_error(candidate, reference),
        eager=relative_error(eager, reference),
        candidate_rms=rms_error(candidate, reference),
        eager_rms=rms_error(eager, reference),
        rounding=torch.finfo(candidate.dtype).eps / 2,
    )
    if not math.isfinite(budget.eager):
        raise AssertionError(f"the eager result is no yardstick: {_worst(eager, reference)}")
    return budget


def assert_within_eager_error(
    candidate: Tensor, eager: Tensor, reference: Tensor, factor: float = 2.0, name: str = "result"
) -> None:
    """Fails when a candidate errs more than `factor` times what eager code of its precision errs."""
    budget = error_budget(candidate, eager, reference)
    if budget.exceeded(factor):
        raise AssertionError(f"{name}: over {factor:g} x eager: {budget}; {_worst(candidate, reference)}")


def _label_mismatches(actual: Tensor, expected: Tensor, margin: Tensor, min_margin: float) -> tuple[Tensor, Tensor]:
    """Bool maps on the CPU: which labels differ, and which are sure enough to be compared."""
    if not (actual.shape == expected.shape == margin.shape):
        shapes = [list(t.shape) for t in (actual, expected, margin)]
        raise AssertionError(f"expected labels and margins of one shape, got {shapes}")
    if actual.is_floating_point() or expected.is_floating_point():
        raise AssertionError(f"expected integer labels, got {actual.dtype} and {expected.dtype}")
    tied = margin.cpu() <= min_margin  # False for NaN, so that an unknown margin is compared
    return actual.cpu().long() != expected.cpu().long(), ~tied


def labels_equal_except_ties(
    actual: Tensor, expected: Tensor, margin: Tensor, min_margin: float, min_compared: float = 0.5
) -> bool:
    """Whether labels agree wherever `margin` (best minus second score) exceeds `min_margin`.

    False too when fewer than the share `min_compared` of the labels is that sure.
    """
    differ, sure = _label_mismatches(actual, expected, margin, min_margin)
    enough = sure.sum().item() >= min_compared * sure.numel()
    return enough and not bool((differ & sure).any())


def assert_labels_equal_except_ties(
    actual: Tensor,
    expected: Tensor,
    margin: Tensor,
    min_margin: float,
    min_compared: float = 0.5,
    name: str = "labels",
) -> None:
    """Fails as `labels_equal_except_ties` says, with the counts and the first place that differs."""
    if labels_equal_except_ties(actual, expected, margin, min_margin, min_compared):
        return
    differ, sure = _label_mismatches(actual, expected, margin, min_margin)
    wrong = (differ & sure).nonzero()
    if len(wrong) == 0:
        raise AssertionError(
            f"{name}: only {sure.sum().item()} of {sure.numel()} margins exceed {min_margin:g}, "
            f"too few to compare (share {min_compared:g} wanted)"
        )
    place = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{name}: {len(wrong)} of {sure.sum().item()} sure labels differ; first at {place}: "
        f"got {actual[place].item()}, expected {expected[place].item()}, margin {margin[place].item():.3g}"
    )
