"""The few classes that an image keeps (RRHC, step two)."""

from __future__ import annotations

import torch
from torch import Tensor

from errseg.ops import reference
from errseg.ops.checks import expect
from errseg.ops.contract import Op


def _fake(votes: Tensor, num_selected: int, required: Tensor | None) -> Tensor:
    return votes.new_empty((votes.shape[0], min(num_selected, votes.shape[1])))


OP = Op(
    "select_classes",
    "(Tensor votes, int num_selected, Tensor? required) -> Tensor",
    reference=reference.select_classes,
    fake=_fake,
)


def select_classes(
    votes: Tensor, num_selected: int, required: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Select the ``num_selected`` classes with most votes; ties go to the lowest class id.

    Args:
        votes: [B, T] int64, non-negative, T of them below 2**63.
        num_selected: K >= 1; with T <= K every class is kept.
        required: [B, T] bool, the classes of the ground truth (training). They come first; voted classes that are
            not among them follow in ascending id until K are found. Of more than K required ones the highest ids
            fall out.
        backend: strict choice of a backend.

    Returns:
        [B, min(K, T)] int64 class ids, ascending. No host synchronisation, no gradient.

    Raises:
        ValueError: on wrong shapes or types, or K < 1.

    Source: paper, RRHC: class selection.
    """
    expect(votes.ndim == 2 and votes.dtype == torch.int64, "votes [B, T] int64", votes)
    check_selection(votes.shape[0], votes.shape[1], num_selected, required)
    return OP(votes, num_selected, required, backend=backend)


def check_selection(batch: int, num_words: int, num_selected: int, required: Tensor | None) -> None:
    """Raise ValueError unless K >= 1 and ``required`` is [B, T] bool or absent."""
    expect(num_selected >= 1, "num_selected >= 1", num_selected)
    if required is not None:
        good = tuple(required.shape) == (batch, num_words) and required.dtype == torch.bool
        expect(good, f"required {[batch, num_words]} bool", required)
