"""What only the host function and the launches of the Triton votes can show."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing import AllocationSpy, forbid_host_syncs, published_votes
from tests.ops.cases import exact_embeddings, words_far_apart

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"


def kernels() -> Any:
    return importlib.import_module("errseg.kernels.class_votes")


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host function alone: the interpreter would take hours for a million words."""
    if DEVICE == "cpu":
        monkeypatch.setattr(type(kernels().CONFIGS["fwd torch.float32"]), "launch", lambda *arguments: None)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 15])
def test_a_million_words_in_bounded_memory_without_a_sync(dtype: torch.dtype, channels: int) -> None:
    pixels = torch.randn(1, channels, 40, 40, device=DEVICE)
    words = torch.randn(1_000_000, channels, device=DEVICE, dtype=dtype)
    required = torch.rand(1, 1_000_000, device=DEVICE) < 1e-4
    with forbid_host_syncs(), AllocationSpy() as spy:
        class_ids = ops.reduce_vocabulary(pixels, words, 48, required, backend="triton")
    assert class_ids.shape == (1, 48)
    assert spy.peak_bytes < 40_000_000


@pytest.mark.usefixtures("no_launches")
def test_scratch_of_the_votes_is_their_lengths() -> None:
    pixels = torch.randn(2, 16, 40, 40, device=DEVICE).contiguous(memory_format=torch.channels_last)
    peaks = []
    for num_words in (10_000, 1_000_000):
        words = torch.randn(1, 16, device=DEVICE).expand(num_words, 16)
        with AllocationSpy() as spy:
            votes = kernels().forward(pixels, words)
        peaks.append(spy.peak_bytes - votes.nbytes - 4 * num_words)
    assert max(peaks) < 264 * 128 * 3 * 8


@pytest.mark.parametrize("programs", [1, 2, 264])
def test_duplicates_in_views_of_words_however_they_are_split(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all four tiles of words, two, or one for each."""
    monkeypatch.setattr(kernels(), "PROGRAMS", programs)
    pixels, words = exact_embeddings(1, 200, 3, 5)
    words[64:128], words[-20:] = words[:64].clone(), words[:20].clone()
    apart = torch.zeros(200, 40, device=DEVICE)[:, 3:19]
    apart.copy_(words)
    wanted = published_votes(torch.einsum("bdhw,td->bthw", pixels, words))
    assert torch.equal(kernels().forward(pixels.to(DEVICE), apart).cpu(), wanted)


def test_offsets_beyond_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = torch.UntypedStorage.copy_

    def copy_unless_same(self: Any, source: Any, *arguments: Any) -> Any:
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *arguments)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_unless_same)  # the interpreter copies onto the same
    pixels, words = torch.randn(1, 16, 3, 5), words_far_apart(tmp_path)
    wanted = ops.class_votes(pixels.double(), words.double(), backend="reference")
    if DEVICE == "cuda":
        words = torch.empty_strided(words.shape, words.stride(), dtype=words.dtype, device=DEVICE).copy_(words)
    got = kernels().forward(pixels.to(DEVICE), words)
    assert torch.equal(got.cpu(), wanted)
