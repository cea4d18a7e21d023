"""Votes: golden counts, exact ties, tails of tiles, memory that does not grow with the vocabulary."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from errseg import ops
from errseg.testing import AllocationSpy, published_votes
from tests.ops.cases import HALF, exact_embeddings, interpreted, on_backends, words_far_apart

backends = on_backends("class_votes")
reference = import_module("errseg.ops.reference.class_votes")


@backends
@pytest.mark.parametrize("case", ["a", "few", "tiny", "two"])
def test_golden_votes(golden, case: str, backend: str) -> None:
    cost, votes = (golden("selection")[f"{case}.{name}"] for name in ("cost", "votes"))
    # Costs as pixel embeddings and unit vectors as words: the cosines keep the ranks of the costs.
    assert torch.equal(ops.class_votes(cost, torch.eye(cost.shape[1]), backend=backend), votes)


@backends
def test_exact_ties_go_to_the_lowest_id(backend: str) -> None:
    words = torch.eye(4)[[3, 1, 0, 1, 3, 0, 2]]  # ids 1 = 3, 0 = 4, 2 = 5
    pixels = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]).T[None, :, :, None]
    # Pixel one ranks words 2, 5, 1; pixel two ranks 0, 4 and then the first of the five at cosine zero.
    assert ops.class_votes(pixels, words, backend=backend).tolist() == [[100, 2, 100, 0, 10, 10, 0]]


@backends
@pytest.mark.parametrize("words", [1, 2, 3, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_equals_the_sorted_volume_at_every_tile_boundary(
    words: int, size: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 64)  # tiles of 64 words
    # Small integers are exact in every order of summation, and tie all the time.
    generator = torch.Generator().manual_seed(words)
    pixels = torch.randint(-2, 3, (2, 6, *size), generator=generator).double()
    text = torch.nn.functional.one_hot(torch.randint(6, (words,), generator=generator), 6).double()
    cost = torch.einsum("bdhw,td->bthw", pixels, text)
    assert torch.equal(ops.class_votes(pixels, text, backend=backend), published_votes(cost))


@backends
def test_duplicate_words_share_no_votes(backend: str) -> None:
    pixels = torch.randn(1, 64, 20, 20)
    words = torch.randn(300, 64).repeat(3, 1)  # every word three times, in different tiles and columns
    votes = ops.class_votes(pixels, words, backend=backend)[0].view(3, 300)
    first = ops.class_votes(pixels, words[:300], backend=backend)[0]
    # The three copies of the best word take all three ranks: the first copy gets 100 wherever it wins.
    assert torch.equal(votes[0] // 100, first // 100)
    assert torch.equal(votes.sum(0) % 111, torch.zeros(300, dtype=torch.int64))


@backends
@pytest.mark.parametrize("words", [65, 100_000])
def test_duplicates_far_apart_leave_the_votes_to_the_first(words: int, backend: str) -> None:
    if interpreted("class_votes", backend):
        words = min(words, 1_500)
    pixels, text = exact_embeddings(2, words, 3, 7)
    text[-3:], text[words // 2] = text[0], text[1]
    cost = torch.einsum("bdhw,td->bthw", pixels, text)
    assert torch.equal(ops.class_votes(pixels, text, backend=backend), published_votes(cost))


@backends
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_embeddings_are_multiplied_in_float32(dtype: torch.dtype, backend: str) -> None:
    pixels, words = torch.randn(2, 32, 8, 9).to(dtype), torch.randn(50, 32).to(dtype)
    assert torch.equal(
        ops.class_votes(pixels, words, backend=backend),
        ops.class_votes(pixels.double(), words.double(), backend="reference"),
    )
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.class_votes(pixels.float(), words.float(), backend=backend)
    assert torch.equal(inside, ops.class_votes(pixels.float(), words.float(), backend=backend))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("of_words", [torch.float32, torch.float64, *HALF])
def test_words_of_another_dtype(dtype: torch.dtype, of_words: torch.dtype, backend: str) -> None:
    pixels = torch.randn(1, 24, 3, 7).to(dtype)
    words = torch.randn(70, 24).bfloat16().half().to(of_words)  # every dtype holds the same
    wanted = ops.class_votes(pixels.double(), words.double(), backend="reference")
    assert torch.equal(ops.class_votes(pixels, words, backend=backend), wanted)


@backends
@pytest.mark.parametrize("channels", [10, 48])
def test_images_in_every_layout(channels: int, backend: str) -> None:
    pixels, words = torch.randn(2, channels, 5, 7), torch.randn(70, channels)
    wanted = ops.class_votes(pixels.double(), words.double(), backend="reference")
    last = pixels.contiguous(memory_format=torch.channels_last)
    views = (pixels, last, pixels.mT.contiguous().mT, torch.stack((last, last), -1)[..., 0])
    for view in views:
        assert torch.equal(ops.class_votes(view, words, backend=backend), wanted)


@backends
def test_images_with_the_channels_last_are_not_copied(backend: str) -> None:
    pixels, words = torch.randn(1, 240, 7, 9).contiguous(memory_format=torch.channels_last), torch.randn(70, 240)
    with AllocationSpy() as spy:
        ops.class_votes(pixels, words, backend=backend)
    assert not any(a.nbytes == pixels.nbytes for a in spy.allocations)


@backends
def test_views_of_words(backend: str) -> None:
    pixels, words = torch.randn(1, 10, 3, 4), torch.randn(70, 30)
    for view in (words[:, 4:14], words[::2, :10], words.T[:10].T, words[:1, :10].expand(70, 10), words[:, ::3]):
        wanted = ops.class_votes(pixels, view.clone(memory_format=torch.contiguous_format), backend="reference")
        assert torch.equal(ops.class_votes(pixels, view, backend=backend), wanted)


@on_backends("class_votes", without=("triton",))  # tests/triton has it
def test_offsets_beyond_32_bits(tmp_path: Path, backend: str) -> None:
    words = words_far_apart(tmp_path)
    pixels = torch.randn(1, 16, 3, 5)
    assert torch.equal(
        ops.class_votes(pixels, words, backend=backend),
        ops.class_votes(pixels.double(), words.double().contiguous(), backend="reference"),
    )


@backends
def test_word_length_does_not_matter_and_zero_words_rank_at_zero(backend: str) -> None:
    pixels, words = torch.randn(1, 8, 6, 6, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    lengths = torch.rand(20, 1, dtype=torch.float64) * 100 + 0.1
    assert torch.equal(
        ops.class_votes(pixels, words, backend=backend),
        ops.class_votes(pixels, words * lengths, backend=backend),
    )
    assert ops.class_votes(pixels.abs(), torch.zeros(3, 8).double(), backend=backend).tolist() == [[3600, 360, 36]]


@backends
def test_memory_does_not_grow_with_the_vocabulary(backend: str) -> None:
    side, num_words = (20, 2_000) if interpreted("class_votes", backend) else (40, 20_000)
    pixels, words = torch.randn(2, 16, side, side), torch.randn(num_words, 16)
    with AllocationSpy() as spy:
        ops.class_votes(pixels, words, backend=backend)
    # Half of one image's full volume, which would be 128 MB at full size.
    assert spy.peak_bytes < side * side * num_words * 4 // 2


@backends
def test_words_are_not_copied_as_a_whole(backend: str) -> None:
    """Neither for another dtype, nor for an odd length, nor for an odd address."""
    channels, num_words = 255, 1_000 if interpreted("class_votes", backend) else 60_000
    words = torch.randn(num_words * channels + 1).bfloat16()[1:].view(num_words, channels)
    with AllocationSpy() as spy:
        ops.class_votes(torch.randn(1, channels, 2, 4), words, backend=backend)
    tile = 0 if backend in ("cpu", "triton") else 3 * reference.TILE_ELEMENTS * 4
    assert spy.peak_bytes < 12 * num_words + tile + 300_000


def test_wrong_arguments_are_named() -> None:
    pixels = torch.randn(1, 8, 2, 2)
    with pytest.raises(ValueError, match=r"expected text_embeddings \[T, 8\], got \[5, 9\] float32"):
        ops.class_votes(pixels, torch.randn(5, 9))
    with pytest.raises(ValueError, match="at least one text embedding"):
        ops.class_votes(pixels, torch.randn(0, 8))
    with pytest.raises(ValueError, match=r"image_embeddings \[B, D, H, W\]"):
        ops.class_votes(pixels[0], torch.randn(5, 8))
