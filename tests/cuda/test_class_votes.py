"""The CUDA kernels of class_votes, emulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.ops import reference
from errseg.testing import published_votes
from tests.cuda.emulated import TYPES, EmulatorFault
from tests.ops.cases import words_far_apart

Emulate = Callable[..., Any]
SOURCE = "class_votes/class_votes.cuh"
ONE, MANY = 1, 132  # multiprocessors: all words in one slice, or as many slices as there are tiles of words


@pytest.fixture(scope="module")
def device(emulate: Emulate) -> Any:
    return emulate("class_votes")


def run(
    device: Any, pixels: Tensor, words: Tensor, *, seed: int = 0, multiprocessors: int = MANY, most_tiles: int = 0
) -> Tensor:
    """[B, D, P], [T, D] with contiguous rows -> [B, T]; scratch memory is poisoned."""
    batch, channels, num_pixels = pixels.shape
    votes = torch.zeros((batch, words.shape[0]), dtype=torch.int64)
    sizes = (batch, channels, num_pixels, words.shape[0], multiprocessors, most_tiles)
    types = TYPES[pixels.dtype], TYPES[words.dtype]
    rows = words if words.is_contiguous() else words.data_ptr()  # only whole tensors travel to another process
    channels_last = pixels.transpose(1, 2).contiguous()
    device("class_votes", seed, *types, channels_last, rows, words.stride(0), votes, *sizes)
    return votes


def scores(pixels: Tensor, words: Tensor) -> Tensor:
    """[B, D, P], [T, D] -> [B, T, P] in float64."""
    return torch.nn.functional.normalize(words.double(), dim=1, eps=1e-12) @ pixels.double()


def check(device: Any, batch: int, channels: int, num_pixels: int, words: int, seed: int = 0, **options: Any) -> None:
    """Small integers: exact in every order of summation, and tied all the time."""
    pixels = torch.randint(-2, 3, (batch, channels, num_pixels)).float()
    text = torch.nn.functional.one_hot(torch.randint(channels, (words,)), channels).float()
    wanted = published_votes(scores(pixels, text)[..., None])
    assert torch.equal(run(device, pixels, text, seed=seed, **options), wanted)


@pytest.mark.parametrize("multiprocessors", [ONE, MANY])
@pytest.mark.parametrize("num_pixels", [1, 35, 64, 130])
@pytest.mark.parametrize("words", [1, 2, 3, 127, 128, 129, 300])
def test_ties_at_every_tile_boundary(device: Any, words: int, num_pixels: int, multiprocessors: int) -> None:
    check(device, 2, 6, num_pixels, words, seed=words, multiprocessors=multiprocessors)


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 32, 33, 70])
def test_any_number_of_channels(device: Any, channels: int) -> None:
    check(device, 1, channels, 37, 140, seed=channels)


@pytest.mark.parametrize("multiprocessors", [ONE, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_equals_the_reference(device: Any, dtype: torch.dtype, multiprocessors: int) -> None:
    for channels, num_pixels in ((40, 99), (41, 64)):  # with and without wide loads
        pixels, words = torch.randn(2, channels, num_pixels).to(dtype), torch.randn(277, channels).to(dtype)
        wanted = reference.class_votes(pixels.double()[..., None], words.double())
        for seed in range(2):
            assert torch.equal(run(device, pixels, words, seed=seed, multiprocessors=multiprocessors), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_types(device: Any, dtype: torch.dtype) -> None:
    pixels, words = torch.randn(1, 24, 50).bfloat16(), torch.randn(60, 24).to(dtype)
    wanted = reference.class_votes(pixels.double()[..., None], words.double())
    assert torch.equal(run(device, pixels, words), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_words_may_lie_apart(device: Any, dtype: torch.dtype) -> None:
    check_views(device, dtype)


def check_views(device: Any, dtype: torch.dtype) -> None:
    pixels, words = torch.randn(1, 20, 40).to(dtype), torch.randn(150, 48).to(dtype)
    for view in (words[:, 8:28], words[:, 5:25], words[::2, :20], words[:1, :20].expand(150, 20)):
        wanted = reference.class_votes(pixels.double()[..., None], view.double())
        assert torch.equal(run(device, pixels, view), wanted)


def test_offsets_beyond_32_bits(device: Any, tmp_path: Path) -> None:
    words, pixels = words_far_apart(tmp_path), torch.randn(1, 16, 30)
    wanted = reference.class_votes(pixels.double()[..., None], words.double())
    assert torch.equal(run(device, pixels, words), wanted)


def check_precision(device: Any, channels: int) -> None:
    """Pixels between two words, their cosines a few units in the last place of float32 apart."""
    for _ in range(4):
        words = torch.randn(2, channels, dtype=torch.float64).abs()
        words /= words.norm(dim=1, keepdim=True)
        gap = 2 * (1 - words[0] @ words[1]) / (1 + words[0] @ words[1])
        offset = (torch.rand(200, dtype=torch.float64) - 0.5) * 2e-5 / gap
        pixels = (words.sum(0)[:, None] + offset * (words[0] - words[1])[:, None]) * (1 + torch.rand(200).double())
        text = torch.cat((words, -words)).float()
        cosines = scores(pixels.float()[None], text)[0]
        clear = (cosines[0] - cosines[1]).abs() > 5e-7 * cosines[0].abs()
        assert clear.sum() > 50
        chosen = pixels.float()[None, :, clear]
        assert torch.equal(run(device, chosen, text), published_votes(scores(chosen, text)[..., None]))


@pytest.mark.parametrize("channels", [2, 512])
def test_products_are_of_float32_grade(device: Any, channels: int) -> None:
    check_precision(device, channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_words_get_equal_scores_wherever_they_stand(device: Any, dtype: torch.dtype) -> None:
    pixels, once = torch.randn(1, 48, 100).to(dtype), torch.randn(101, 48).to(dtype)
    votes = run(device, pixels, once.repeat(3, 1), seed=3)[0].view(3, 101)
    first = run(device, pixels, once, seed=3)[0] // 100
    # The three copies of the best word take all three ranks, the first copy the first.
    assert torch.equal(votes, torch.stack((100 * first, 10 * first, first)))


def test_length_of_words_does_not_matter_and_zero_words_rank_at_zero(device: Any) -> None:
    pixels, words = torch.randn(1, 8, 36), torch.randn(20, 8)
    lengths = 2.0 ** torch.randint(-30, 60, (20, 1))
    assert torch.equal(run(device, pixels, words), run(device, pixels, words * lengths))
    assert run(device, pixels.abs(), torch.zeros(3, 8)).tolist() == [[3600, 360, 36]]
    words[4] = 0
    assert torch.equal(run(device, pixels, words), published_votes(scores(pixels, words)[..., None]))


def test_all_scores_negative(device: Any) -> None:
    pixels, words = torch.ones(1, 16, 5), -torch.rand(130, 16) - 0.1
    assert torch.equal(run(device, pixels, words), published_votes(scores(pixels, words)[..., None]))


def test_launches_of_a_few_tiles(device: Any) -> None:
    check(device, 3, 10, 70, 150, most_tiles=1)
    check(device, 3, 10, 70, 150, most_tiles=4)


def test_an_empty_batch(device: Any) -> None:
    assert run(device, torch.randn(0, 8, 9), torch.randn(5, 8)).shape == (0, 5)


@pytest.mark.parametrize("words", [1, 20, 847, 100_000, 1_000_000])
@pytest.mark.parametrize(("batch", "num_pixels"), [(1, 1), (1, 1600), (8, 2304), (1, 4_000_000), (300, 10_000)])
def test_scratch_is_bounded_and_slices_cover_all_words(device: Any, batch: int, num_pixels: int, words: int) -> None:
    result = torch.zeros(3, dtype=torch.int64)
    device("plan", batch, num_pixels, words, 132, result)
    scratch, blocks, covered = result.tolist()
    assert 0 < scratch <= 32 << 20
    assert covered >= words and blocks >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_sanitizers(emulate: Emulate, dtype: torch.dtype) -> None:
    sanitized = emulate("class_votes", sanitized=True)
    pixels, words = torch.randn(2, 19, 67).to(dtype), torch.randn(131, 19).to(dtype)
    wanted = reference.class_votes(pixels.double()[..., None], words.double())
    for multiprocessors in (ONE, MANY):
        assert torch.equal(run(sanitized, pixels, words, seed=5, multiprocessors=multiprocessors), wanted)


BREAKS = {
    "rows taken for contiguous": ("all, p.word_stride, p.words", "all, p.channels, p.words"),
    "images taken for the first": ("image * p.num_pixels + (tile", "(tile"),
    "last tile of words dropped": ("first_word < slice_end;", "first_word + kWords <= slice_end;"),
    "last tile of pixels dropped": (
        "tiles_per_image = ceil_div(p.num_pixels, kPixels)",
        "tiles_per_image = std::max(1, p.num_pixels / kPixels)",
    ),
    "last channels dropped": ("channel < p.channels;", "channel + How::kDepth <= p.channels;"),
    "ties to the highest id": ("id < ids[rank]", "id > ids[rank]"),
    "padding takes part": ("if (first_word + word < slice_end) top", "top"),
    "third rank lost": ("{100, 10, 1}", "{100, 10, 0}"),
    "no barrier before the products": ("squares);\n            __syncthreads();", "squares);"),
    "sums kept in the tensor cores": (
        "float fresh[kPixelTiles][4] = {};",
        "float fresh[kPixelTiles][4]; for (int m = 0; m < kPixelTiles; ++m) for (int i = 0; i < 4; ++i)"
        " fresh[m][i] = sums[m][n + h][i], sums[m][n + h][i] = 0;",
    ),
    "two parts only": ("run_split<Split<bf16, 3>>", "run_split<Split<bf16, 2>>"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(emulate: Emulate, name: str) -> None:
    broken = emulate("class_votes", edits={SOURCE: BREAKS[name]})
    with pytest.raises((AssertionError, EmulatorFault)):
        check_views(broken, torch.float32)
        check(broken, 2, 37, 67, 131, seed=1, multiprocessors=ONE)
        test_all_scores_negative(broken)
        check_precision(broken, 2)
        check_precision(broken, 512)
