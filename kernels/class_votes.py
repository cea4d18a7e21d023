"""Votes of the pixels for the words, without a T x H x W tensor.

Three launches: the inverse lengths of the words; per block of pixels a walk over the words that keeps the three best
of each pixel in registers; the votes. The walk is split into a few stretches of the vocabulary where pixels alone
would not fill a GPU, and the last launch merges them in ascending order, so that the split does not change a rank.

Scores are float32-grade: float16 and bfloat16 products are exact in float32, and float32 operands are split into
three tf32 products. The interpreter computes tf32 as float32, so that it cannot show the error of this choice. Words
are read where they lie, whatever their number, dtype and length; pixels as the backbone leaves them, with the channels
last and in whole vectors, and copied otherwise.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config

ALIGN = 16  # elements, and bytes of an address
FARTHEST = 1 << 24  # elements between rows of words: a tile's offsets are 32-bit
PROGRAMS = 264  # enough for two on each of 132 multiprocessors


@triton.jit(do_not_specialize=["num_words"])
def _class_votes_norm_kernel(
    words,  # [T, D]
    inverse_lengths,  # [T]
    num_words,
    channels,
    word_stride,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    squares = tl.zeros((WORDS, CHANNELS), DTYPE)
    for start in range(0, channels, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        inside = (t < num_words)[:, None] & (d < channels)[None, :]
        word = tl.load(words + t[:, None] * word_stride + d[None, :], mask=inside, other=0.0).to(DTYPE)
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
    pixels,  # [B, P, pixel stride], zero beyond D
    words,  # [T, D], of any dtype: tiles are converted to that of the pixels
    inverse_lengths,  # [T]
    best_scores,  # [splits, 3, B P]
    best_words,  # [splits, 3, B P] int32, -1 for none
    batch,
    num_pixels,
    num_words,
    words_per_split,
    channels,
    pixel_stride,
    word_stride,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    WORDS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Neighbouring programs share their words, which they find in the L2 cache.
    pixel_blocks = tl.cdiv(num_pixels, PIXELS)
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    first_pixel = tl.program_id(0) % pixel_blocks * PIXELS
    p = first_pixel + tl.arange(0, PIXELS)
    pixels += (image * num_pixels + first_pixel) * pixel_stride
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
    pixel_offsets = tl.arange(0, PIXELS)[:, None] * pixel_stride + channel[None, :]  # [PIXELS, CHANNELS]
    word_offsets = columns[None, :] * word_stride + channel[:, None]  # [CHANNELS, WORDS]
    word_tiles = words + split.to(tl.int64) * words_per_split * word_stride
    for start in range(split * words_per_split, end, WORDS):
        t = start + columns
        scores = tl.zeros((PIXELS, WORDS), DTYPE)
        for first in range(0, channels, CHANNELS):
            inside = (p < num_pixels)[:, None] & (channel < pixel_stride - first)[None, :]
            pixel_tile = tl.load(pixels + first + pixel_offsets, mask=inside, other=0.0)
            inside = (channel < channels - first)[:, None] & (t < end)[None, :]
            word_tile = tl.load(word_tiles + first + word_offsets, mask=inside, other=0.0).to(pixel_tile.dtype)
            scores = tl.dot(pixel_tile, word_tile, scores, input_precision=PRECISION, out_dtype=DTYPE)
        scores *= tl.load(inverse_lengths + t, mask=t < end, other=0.0)[None, :]
        scores = tl.where((t < end)[None, :], scores, float("-inf"))
        for _ in tl.static_range(3):
            score, column = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
            scores = tl.where(columns[None, :] == column[:, None], float("-inf"), scores)
            score_1, word_1, score_2, word_2, score_3, word_3 = _insert(
                score, start + column, score_1, word_1, score_2, word_2, score_3, word_3
            )
        word_tiles += WORDS * word_stride

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
        (_dtype, _dtype, _score, _score, torch.int32, 1, 1600, 847, 64, 640, 640, 640),
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
        (_dtype, _score, 847, 640, 640),
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


# The same launches are compiled apart for words of another dtype, and for rows that no wide load can read.
for _name, _dtype, _words, _channels in (
    ("bfloat16 words", torch.float32, torch.bfloat16, 640),
    *(("odd rows", _dtype, _dtype, 641) for _dtype in LANGUAGE_DTYPE),
):
    _config = CONFIGS[f"fwd {_dtype}"]
    _arguments = (_dtype, _words, *_config.arguments[2:-3], _channels, 656, _channels)
    CONFIGS[f"fwd {_dtype}, {_name}"] = dataclasses.replace(_config, arguments=_arguments)


def forward(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """[B, D, H, W], [T, D] -> [B, T] int64; see :func:`errseg.ops.class_votes`."""
    dtype = _product_dtype(image_embeddings.dtype, text_embeddings.dtype)
    pixels = _whole_vectors(image_embeddings.permute(0, 2, 3, 1).flatten(1, 2).to(dtype))  # [B, P, D + padding]
    words = _with_contiguous_rows(text_embeddings)
    (batch, num_pixels, pixel_stride), (num_words, channels) = pixels.shape, words.shape
    votes = torch.zeros((batch, num_words), dtype=torch.int64, device=pixels.device)
    if not batch * num_pixels:
        return votes

    score_dtype = torch.promote_types(dtype, torch.float32)
    inverse_lengths = words.new_empty(num_words, dtype=score_dtype)
    norm = CONFIGS[f"norm {dtype}"]
    grid = (triton.cdiv(num_words, norm.constants["WORDS"]),)
    norm.launch(grid, words, inverse_lengths, num_words, channels, words.stride(0))

    fwd = CONFIGS[f"fwd {dtype}"]
    pixel_blocks = batch * triton.cdiv(num_pixels, fwd.constants["PIXELS"])
    word_tiles = triton.cdiv(num_words, fwd.constants["WORDS"])
    tiles_per_split = triton.cdiv(word_tiles, max(1, PROGRAMS // pixel_blocks))
    splits = triton.cdiv(word_tiles, tiles_per_split)
    best_scores = words.new_empty((splits, 3, batch * num_pixels), dtype=score_dtype)
    best_words = words.new_empty(best_scores.shape, dtype=torch.int32)
    sizes = batch, num_pixels, num_words
    split_size = tiles_per_split * fwd.constants["WORDS"]
    arguments = pixels, words, inverse_lengths, best_scores, best_words
    fwd.launch((pixel_blocks, splits), *arguments, *sizes, split_size, channels, pixel_stride, words.stride(0))

    count = CONFIGS[f"count {score_dtype}"]
    grid = (triton.cdiv(batch * num_pixels, count.constants["PIXELS"]),)
    count.launch(grid, best_scores, best_words, votes, *sizes, splits)
    return votes


def _product_dtype(images: torch.dtype, words: torch.dtype) -> torch.dtype:
    """The dtype that is multiplied: float64 for float64 pixels, half precision where both agree, else float32."""
    return images if images in (torch.float64, words) else torch.float32


def _whole_vectors(pixels: Tensor) -> Tensor:
    """[B, P, D] -> zeros up to whole vectors, at an address of whole vectors: one kernel with wide loads for all."""
    if pixels.shape[2] % ALIGN:
        return F.pad(pixels, (0, -pixels.shape[2] % ALIGN))
    pixels = pixels.contiguous()
    return pixels.clone() if pixels.data_ptr() % ALIGN else pixels


def _with_contiguous_rows(words: Tensor) -> Tensor:
    """[T, D], copied only when the numbers of a word do not lie side by side."""
    row, number = words.stride()
    return words if number == 1 and 0 <= row <= FARTHEST else words.contiguous()
