"""Embeddings to classes: golden selections, ties, ground truth, and a million words in bounded memory."""

from __future__ import annotations

import json

import pytest
import torch

from errseg import ops
from errseg.testing import (
    AllocationSpy,
    forbid_host_syncs,
    measure_peak_memory,
    published_selection,
    published_votes,
)
from tests.ops.cases import exact_embeddings, on_backends

backends = on_backends("class_votes")
native_backends = on_backends("class_votes", without=("triton",))
LIMIT = 64_000_000  # bytes beyond the arguments, for a million words and 40 x 40 pixels


@backends
@pytest.mark.parametrize("case", ["a", "few", "tiny", "two"])
def test_golden_selections(golden, case: str, backend: str) -> None:
    cost, wanted = (golden("selection")[f"{case}.{name}"] for name in ("cost", "selection"))
    # Costs as pixel embeddings and unit vectors as words: the cosines keep the ranks of the costs.
    words = torch.eye(cost.shape[1])
    assert torch.equal(ops.reduce_vocabulary(cost, words, wanted.shape[1], backend=backend), wanted)


@backends
@pytest.mark.parametrize("words", [1, 2, 3, 63, 64, 65, 300])
@pytest.mark.parametrize("num_selected", [1, 2, 16])
def test_equals_the_published_order(words: int, num_selected: int, backend: str) -> None:
    pixels, text = exact_embeddings(2, words, 3, 5)
    text[words // 2 :] = text[: words - words // 2].clone()  # half of the words twice, or nearly so
    required = torch.rand(2, words) < 0.1
    votes = published_votes(torch.einsum("bdhw,td->bthw", pixels, text))
    for needed in (None, required):
        got = ops.reduce_vocabulary(pixels, text, num_selected, needed, backend=backend)
        assert torch.equal(got, published_selection(votes, num_selected, needed))


@native_backends
def test_a_hundred_thousand_words(backend: str) -> None:
    pixels, text = exact_embeddings(2, 100_000, 5, 7)
    required = torch.rand(2, 100_000) < 1e-4
    votes = published_votes(torch.einsum("bdhw,td->bthw", pixels, text))
    for needed in (None, required):
        got = ops.reduce_vocabulary(pixels, text, 48, needed, backend=backend)
        assert torch.equal(got, published_selection(votes, 48, needed))


@backends
def test_few_words_are_all_kept(backend: str) -> None:
    pixels, words = torch.randn(2, 8, 3, 3), torch.randn(5, 8)
    for num_selected in (5, 9):
        for required in (None, torch.zeros(2, 5, dtype=torch.bool)):
            got = ops.reduce_vocabulary(pixels, words, num_selected, required, backend=backend)
            assert got.tolist() == [[0, 1, 2, 3, 4]] * 2
    for num_selected in (3, 5):
        empty = ops.reduce_vocabulary(pixels[:0], words, num_selected, backend=backend)
        assert empty.shape == (0, num_selected) and empty.dtype == torch.int64


@native_backends
@pytest.mark.parametrize("with_required", [False, True])
def test_never_synchronises_with_the_host(with_required: bool, backend: str) -> None:
    pixels, words = torch.randn(2, 8, 3, 3), torch.randn(20, 8)
    required = torch.rand(2, 20) < 0.2 if with_required else None
    with forbid_host_syncs():
        ops.reduce_vocabulary(pixels, words, 4, required, backend=backend)


@backends
@pytest.mark.parametrize("num_selected", [4, 20])
def test_compiles_to_one_graph(num_selected: int, backend: str) -> None:
    torch.compiler.reset()
    arguments = torch.randn(2, 8, 3, 3), torch.randn(20, 8), num_selected, torch.rand(2, 20) < 0.2
    compiled = torch.compile(
        lambda *args: ops.reduce_vocabulary(*args, backend=backend), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*arguments), ops.reduce_vocabulary(*arguments, backend=backend))


@backends
def test_opcheck_on_words_of_another_dtype(backend: str) -> None:
    overload = ops.OPS["class_votes"].overload
    torch.library.opcheck(overload, (torch.randn(1, 8, 3, 3), torch.randn(20, 8).bfloat16(), backend))


def test_carries_no_gradient() -> None:
    pixels, words = torch.randn(1, 8, 3, 3, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    assert not ops.reduce_vocabulary(pixels, words, 4).requires_grad


# ---- a million words


def test_tensors_of_a_million_words() -> None:
    pixels, words = torch.randn(1, 16, 40, 40), torch.randn(1_000_000, 16)
    required = torch.rand(1, 1_000_000) < 1e-4
    with AllocationSpy() as spy:
        class_ids = ops.reduce_vocabulary(pixels, words, 48, required, backend="reference")
    assert class_ids.shape == (1, 48)
    assert spy.peak_bytes < LIMIT


_SETUP = """
import json, torch
from errseg import ops
torch.manual_seed(0)
pixels, words, required = torch.randn(1, 16, 40, 40), torch.randn(1_000_000, 16), torch.rand(1, 1_000_000) < 1e-4
ops.reduce_vocabulary(pixels, words[:5000], 48, required[:, :5000], backend={backend!r})
"""
_BODY = """
ids = ops.reduce_vocabulary(pixels, words, 48, required, backend={backend!r})
print(json.dumps(ids.tolist()))
"""
_TRIM = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory is given back at once


@native_backends
def test_memory_of_the_process_with_a_million_words(backend: str) -> None:
    measured = measure_peak_memory(_SETUP.format(backend=backend), _BODY.format(backend=backend), env=_TRIM)
    class_ids = json.loads(measured.stdout.splitlines()[-1])[0]
    assert class_ids == sorted(set(class_ids)) and len(class_ids) == 48
    assert measured.extra < LIMIT


def test_wrong_arguments_are_named() -> None:
    pixels, words = torch.randn(2, 8, 2, 2), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"expected text_embeddings \[T, 8\], got \[5, 9\] float32"):
        ops.reduce_vocabulary(pixels, torch.randn(5, 9), 3)
    with pytest.raises(ValueError, match="at least one text embedding"):
        ops.reduce_vocabulary(pixels, words[:0], 3)
    for num_selected in (3, 9):  # voted on, or all kept
        with pytest.raises(ValueError, match=r"required \[2, 5\] bool, got \[2, 4\] bool"):
            ops.reduce_vocabulary(pixels, words, num_selected, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_selected >= 1, got 0"):
        ops.reduce_vocabulary(pixels, words, 0)
    with pytest.raises(ops.BackendError, match=r"cuda: (needs tensors on cuda|no NVIDIA GPU)"):
        ops.reduce_vocabulary(pixels, words, 3, backend="cuda")
