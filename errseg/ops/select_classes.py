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
        votes: [B, T] int64, non-negative.
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
    expect(num_selected >= 1, "num_selected >= 1", num_selected)
    if required is not None:
        good = required.shape == votes.shape and required.dtype == torch.bool
        expect(good, f"required {list(votes.shape)} bool", required)
    return OP(votes, num_selected, required, backend=backend)
