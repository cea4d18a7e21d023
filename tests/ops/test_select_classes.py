"""Selection: golden sets, tie rule, ground-truth classes."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.testing import published_selection
from tests.ops.cases import on_backends

backends = on_backends("select_classes")


@backends
@pytest.mark.parametrize("case", ["a", "few", "tiny", "two"])
def test_golden_selections(golden, case: str, backend: str) -> None:
    g = golden("selection")
    votes, wanted, official = (g[f"{case}.{n}"] for n in ("votes", "selection", "official_cpu_selection"))
    selected = ops.select_classes(votes, wanted.shape[1], backend=backend)
    assert torch.equal(selected, wanted)
    sure = wanted[g[f"{case}.sure"]]
    assert torch.isin(sure, official).all()


@backends
@pytest.mark.parametrize("num_selected", [1, 3, 8, 9, 20])
def test_equals_sorting_by_votes_then_id(num_selected: int, backend: str) -> None:
    votes = torch.randint(0, 3, (16, 9)) * 10  # many ties
    required = torch.rand(16, 9) < 0.3
    required[0], required[1] = True, False
    for needed in (None, required):
        got = ops.select_classes(votes, num_selected, needed, backend=backend)
        assert torch.equal(got, published_selection(votes, num_selected, needed))


@backends
def test_the_documented_example(backend: str) -> None:
    votes = torch.zeros(1, 10, dtype=torch.int64)
    votes[0, [2, 5, 9]] = torch.tensor([1, 2, 1000])
    required = torch.zeros(1, 10, dtype=torch.bool)
    required[0, 7] = True
    assert ops.select_classes(votes, 3, required, backend=backend).tolist() == [[2, 5, 7]]


@backends
def test_surplus_ground_truth_drops_the_highest_ids(backend: str) -> None:
    required = torch.ones(1, 6, dtype=torch.bool)
    votes = torch.tensor([[0, 0, 0, 0, 0, 500]])
    assert ops.select_classes(votes, 4, required, backend=backend).tolist() == [[0, 1, 2, 3]]


@backends
def test_large_vocabularies_keep_their_order(backend: str) -> None:
    votes = torch.zeros(1, 1_000_000, dtype=torch.int64)
    votes[0, [999_999, 123_456]] = torch.tensor([111 * 10_000, 1])
    assert ops.select_classes(votes, 4, backend=backend).tolist() == [[0, 1, 123_456, 999_999]]


def test_wrong_arguments_are_named() -> None:
    votes = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"votes \[B, T\] int64, got \[2, 5\] float32"):
        ops.select_classes(votes.float(), 3)
    with pytest.raises(ValueError, match="num_selected >= 1, got 0"):
        ops.select_classes(votes, 0)
    with pytest.raises(ValueError, match=r"required \[2, 5\] bool, got \[2, 4\] bool"):
        ops.select_classes(votes, 3, torch.zeros(2, 4, dtype=torch.bool))
