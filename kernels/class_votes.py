"""Votes of the pixels for the words, without a T x H x W tensor.

Three launches: the inverse lengths of the words; per block of pixels a walk over the words that keeps the three best
of each pixel in registers; the votes. The walk is split into a few stretches of the vocabulary where pixels alone
would not fill a GPU, and the last launch merges them in ascending order, so that the split does not change a rank.

Scores are float32-grade: float16 and bfloat16 products are exact in float32, and float32 operands are split into
three tf32 products. The interpreter computes tf32 as float32, so that it cannot show the error of this choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config

ALIGN = 16  # elements, and bytes of an address
PROGRAMS = 264  # enough for two on each of 132 multiprocessors


@triton.jit(do_not_specialize=["num_words"])
def _class_votes_norm_kernel(
    words,  # [T, D]
    inverse_lengths,  # [T]
    num_words,
    channels,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    squares = tl.zeros((WORDS, CHANNELS), DTYPE)
    for start in range(0, channels, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        inside = (t < num_words)[:, None] & (d < channels)[None, :]
        word = tl.load(words + t[:, None] * channels + d[None, :], mask=inside, other=0.0).to(DTYPE)
        squares += word * word
    length = tl.sqrt(tl.sum(squares, 1))
    tl.store(inverse_lengths + t, 1.0 / tl.maximum(length, 1e-12), mask=t < num_words)


@triton.jit
def _insert(score, word, score_1, word_1, score_2, word_2, score_3, word_3):
    """Put a word among the three best; strictly, so that of equal scores the earlier word stays in front."""
    first, second, third = score > score_1, score > score_2, score > score_3
    score_3 = tl.where(second, score_2, tl.where(third, score, score_3))
    word_3 = tl.where(second, word_2, tl.where(third, word, word_3))
    score_2 = tl.where(first, score_1, tl.where(second, score, score_2))
    word_2 = tl.where(first, word_1, tl.where(second, word, word_2))
    score_1 = tl.where(first, score, score_1)
    word_1 = tl.where(first, word, word_1)
    return score_1, word_1, score_2, word_2, score_3, word_3


@triton.jit(do_not_specialize=["batch", "num_pixels", "num_words", "words_per_split"])
def _class_votes_fwd_kernel(
    images,  # [B, D, pixel stride]
    words,  # [T, D]
    inverse_lengths,  # [T]
    best_scores,  # [splits, 3, B P]
    best_words,  # [splits, 3, B P] int32, -1 for none
    batch,
    num_pixels,
    num_words,
    words_per_split,
    channels,
    pixel_stride,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    WORDS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Neighbouring programs share their words, which they find in the L2 cache.
    pixel_blocks = tl.cdiv(num_pixels, PIXELS)
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    p = tl.program_id(0) % pixel_blocks * PIXELS + tl.arange(0, PIXELS)
    pixels = images + image * channels * pixel_stride
    split = tl.program_id(1)
    end = tl.minimum((split + 1) * words_per_split, num_words)

    score_1 = tl.full((PIXELS,), float("-inf"), DTYPE)
    score_2 = tl.full((PIXELS,), float("-inf"), DTYPE)
    score_3 = tl.full((PIXELS,), float("-inf"), DTYPE)
    word_1 = tl.full((PIXELS,), -1, tl.int32)
    word_2 = tl.full((PIXELS,), -1, tl.int32)
    word_3 = tl.full((PIXELS,), -1, tl.int32)
    columns = tl.arange(0, WORDS)
    channel = tl.arange(0, CHANNELS)
    pixel_offsets = channel[None, :] * pixel_stride + p[:, None]  # [PIXELS, CHANNELS]
    word_offsets = columns[None, :] * channels + channel[:, None]  # [CHANNELS, WORDS]
    word_tiles = words + split.to(tl.int64) * words_per_split * channels
    for start in range(split * words_per_split, end, WORDS):
        t = start + columns
        scores = tl.zeros((PIXELS, WORDS), DTYPE)
        for first in range(0, channels, CHANNELS):
            there = channel < channels - first
            inside = (p < pixel_stride)[:, None] & there[None, :]
            pixel_tile = tl.load(pixels + first * pixel_stride + pixel_offsets, mask=inside, other=0.0)
            inside = there[:, None] & (t < end)[None, :]
            word_tile = tl.load(word_tiles + first + word_offsets, mask=inside, other=0.0)
            scores = tl.dot(pixel_tile, word_tile, scores, input_precision=PRECISION, out_dtype=DTYPE)
        scores *= tl.load(inverse_lengths + t, mask=t < end, other=0.0)[None, :]
        scores = tl.where((t < end)[None, :], scores, float("-inf"))
        for _ in tl.static_range(3):
            score, column = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
            scores = tl.where(columns[None, :] == column[:, None], float("-inf"), scores)
            score_1, word_1, score_2, word_2, score_3, word_3 = _insert(
                score, start + column, score_1, word_1, score_2, word_2, score_3, word_3
            )
        word_tiles += WORDS * channels

    plane = batch.to(tl.int64) * num_pixels
    out = split * 3 * plane + image * num_pixels + p
    tl.store(best_scores + out, score_1, mask=p < num_pixels)
    tl.store(best_scores + out + plane, score_2, mask=p < num_pixels)
    tl.store(best_scores + out + 2 * plane, score_3, mask=p < num_pixels)
    tl.store(best_words + out, word_1, mask=p < num_pixels)
    tl.store(best_words + out + plane, word_2, mask=p < num_pixels)
    tl.store(best_words + out + 2 * plane, word_3, mask=p < num_pixels)


@triton.jit(do_not_specialize=["batch", "num_pixels", "num_words", "splits"])
def _class_votes_count_kernel(
    best_scores,  # [splits, 3, B P]
    best_words,  # [splits, 3, B P]
    votes,  # [B, T] int64, zeros
    batch,
    num_pixels,
    num_words,
    splits,
    DTYPE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    total = batch.to(tl.int64) * num_pixels
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = p < total
    score_1 = tl.full((PIXELS,), float("-inf"), DTYPE)
    score_2 = tl.full((PIXELS,), float("-inf"), DTYPE)
    score_3 = tl.full((PIXELS,), float("-inf"), DTYPE)
    word_1 = tl.full((PIXELS,), -1, tl.int32)
    word_2 = tl.full((PIXELS,), -1, tl.int32)
    word_3 = tl.full((PIXELS,), -1, tl.int32)
    for row in range(3 * splits):
        score = tl.load(best_scores + row * total + p, mask=inside, other=float("-inf"))
        word = tl.load(best_words + row * total + p, mask=inside, other=-1)
        score_1, word_1, score_2, word_2, score_3, word_3 = _insert(
            score, word, score_1, word_1, score_2, word_2, score_3, word_3
        )
    votes += p // num_pixels * num_words
    # Integers add up to the same in every order.
    tl.atomic_add(votes + word_1, tl.full((PIXELS,), 100, tl.int64), mask=inside & (word_1 >= 0), sem="relaxed")
    tl.atomic_add(votes + word_2, tl.full((PIXELS,), 10, tl.int64), mask=inside & (word_2 >= 0), sem="relaxed")
    tl.atomic_add(votes + word_3, tl.full((PIXELS,), 1, tl.int64), mask=inside & (word_3 >= 0), sem="relaxed")


CONFIGS: dict[str, Config] = {}
# 128 pixels over 8 warps: the 64 scores of a pixel stay within 4 lanes, so that ranking needs no shared memory.
for _dtype, _precision, _tile, _warps, _stages in (
    (torch.float32, "tf32x3", (128, 64, 16), 8, 3),
    (torch.bfloat16, "ieee", (128, 64, 64), 8, 3),
    (torch.float16, "ieee", (128, 64, 64), 8, 3),
    (torch.float64, "ieee", (32, 32, 16), 4, 2),
):
    _score = torch.promote_types(_dtype, torch.float32)
    CONFIGS[f"fwd {_dtype}"] = Config(
        _class_votes_fwd_kernel,
        (_dtype, _dtype, _score, _score, torch.int32, 1, 1600, 847, 64, 640, 1600),
        {
            "DTYPE": LANGUAGE_DTYPE[_score],
            "PRECISION": _precision,
            **dict(zip(("PIXELS", "WORDS", "CHANNELS"), _tile, strict=True)),
        },
        _warps,
        _stages,
        max_registers=255 if _dtype == torch.float64 else None,
    )
    CONFIGS[f"norm {_dtype}"] = Config(
        _class_votes_norm_kernel,
        (_dtype, _score, 847, 640),
        {"DTYPE": LANGUAGE_DTYPE[_score], "WORDS": 8, "CHANNELS": 128},
        num_warps=4,
    )
for _score in (torch.float32, torch.float64):
    CONFIGS[f"count {_score}"] = Config(
        _class_votes_count_kernel,
        (_score, torch.int32, torch.int64, 1, 1600, 847, 7),
        {"DTYPE": LANGUAGE_DTYPE[_score], "PIXELS": 64},
        num_warps=2,
    )


def forward(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """[B, D, H, W], [T, D] -> [B, T] int64; see :func:`errseg.ops.class_votes`."""
    dtype = _product_dtype(image_embeddings.dtype, text_embeddings.dtype)
    images, words = image_embeddings.flatten(2).to(dtype), text_embeddings.to(dtype)
    batch, channels, num_pixels = images.shape
    num_words = words.shape[0]
    votes = torch.zeros((batch, num_words), dtype=torch.int64, device=images.device)
    if not batch * num_pixels:
        return votes

    images = _aligned(images, (0, -num_pixels % ALIGN, 0, -channels % ALIGN))
    words = _aligned(words, (0, -channels % ALIGN))
    channels, pixel_stride = images.shape[1:]
    score_dtype = torch.promote_types(dtype, torch.float32)
    inverse_lengths = words.new_empty(num_words, dtype=score_dtype)
    norm = CONFIGS[f"norm {dtype}"]
    norm.launch((triton.cdiv(num_words, norm.constants["WORDS"]),), words, inverse_lengths, num_words, channels)

    fwd = CONFIGS[f"fwd {dtype}"]
    pixel_blocks = batch * triton.cdiv(num_pixels, fwd.constants["PIXELS"])
    word_tiles = triton.cdiv(num_words, fwd.constants["WORDS"])
    tiles_per_split = triton.cdiv(word_tiles, max(1, PROGRAMS // pixel_blocks))
    splits = triton.cdiv(word_tiles, tiles_per_split)
    best_scores = words.new_empty((splits, 3, batch * num_pixels), dtype=score_dtype)
    best_words = words.new_empty(best_scores.shape, dtype=torch.int32)
    sizes = batch, num_pixels, num_words
    split_size = tiles_per_split * fwd.constants["WORDS"]
    arguments = images, words, inverse_lengths, best_scores, best_words
    fwd.launch((pixel_blocks, splits), *arguments, *sizes, split_size, channels, pixel_stride)

    count = CONFIGS[f"count {score_dtype}"]
    grid = (triton.cdiv(batch * num_pixels, count.constants["PIXELS"]),)
    count.launch(grid, best_scores, best_words, votes, *sizes, splits)
    return votes


def _aligned(tensor: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Zeros up to whole vectors, at an address of whole vectors: one kernel with wide loads for all sizes."""
    if any(padding):
        return F.pad(tensor, padding)
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGN else tensor


def _product_dtype(images: torch.dtype, words: torch.dtype) -> torch.dtype:
    """The dtype that is multiplied: float64 for float64 pixels, half precision where both agree, else float32."""
    if images == torch.float64 or images == words:
        return images
    return torch.float32
