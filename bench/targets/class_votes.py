"""Votes of the pixels for the words."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts, vary
from errseg.bench.gate import Trial, require
from errseg.bench.registry import Bar, Implementation, Inputs, Target, TooLarge
from errseg.bench.targets._ops import B_AXIS, EVAL_L, SIZE_AXIS, SMALL, T_AXIS
from errseg.testing.inputs import random_tensor, random_text_embeddings
from errseg.testing.published_decoder import published_cost_volume, published_votes
from errseg.verify.checks import Check, compare_form, vote_bounds

BASE = Case(process_memory=True)
LARGE = Case(words=100_000, process_memory=True)
MILLION = Case(model="small", words=1_000_000, process_memory=True)  # short words: 160 MB of them


def _inputs(case: Case, seed: int) -> Inputs:
    """Images as the backbone leaves them, with the channels last."""
    dim = case.decoder.text_dim
    pixels = random_tensor(case.batch, dim, case.os16, case.os16, seed=seed)
    return pixels.contiguous(memory_format=torch.channels_last), random_text_embeddings(case.words, dim, seed=0)


def _in_memory(inputs: Inputs, volumes: int) -> Inputs:
    """The inputs, where there is room for so many volumes of scores [B, T, H, W]."""
    from errseg.verify.room import free_gigabytes

    images, words = inputs
    needed = volumes * images[:, 0].numel() * len(words) * images.element_size() / 1e9
    free = free_gigabytes(images.device)
    if needed > 0.8 * free:
        raise TooLarge(f"needs {needed:.1f} GB, {free:.1f} GB are free")
    return inputs


def _published(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    return published_votes(published_cost_volume(image_embeddings, text_embeddings))


def _matmul_topk(image_embeddings: Tensor, normalized_text: Tensor) -> Tensor:
    """The eager minimum: one product and its three best rows; nothing is counted."""
    return (normalized_text @ image_embeddings.flatten(2)).topk(min(3, len(normalized_text)), dim=1).indices


def _prepare_matmul_topk(inputs: Inputs) -> Inputs:
    image_embeddings, text_embeddings = _in_memory(inputs, volumes=1)
    return image_embeddings, F.normalize(text_embeddings, dim=-1)


def _count(num_words: int, winners: Tensor) -> Tensor:
    votes = winners.new_zeros(winners.shape[0], num_words)
    for rank, weight in zip(winners.unbind(1), (100, 10, 1), strict=False):
        votes.scatter_add_(1, rank, torch.full_like(rank, weight))
    return votes


def _check(trial: Trial) -> None:
    """Within what float32-grade cosines leave open; eager code in half precision may move half of the votes."""
    image_embeddings, text_embeddings = trial.eager.convert(trial.inputs)
    votes = trial.of(trial.candidate).result
    lowest, highest, _ = trial.once("bounds", lambda: vote_bounds(image_embeddings, text_embeddings))
    require(compare_form("votes", votes, lowest) or Check("votes", "wrong", 0.0, 0.0))
    total = image_embeddings.shape[-2] * image_embeddings.shape[-1] * sum((100, 10, 1)[: len(text_embeddings)])
    if bool((votes.sum(1) != total).any()):
        raise AssertionError(f"{votes.sum(1).tolist()} votes in total, expected {total} per image")
    outside = (lowest - votes).clamp_min(0).sum(1) + (votes - highest).clamp_min(0).sum(1)
    rounds = trial.candidate.dtype != torch.float32 and trial.candidate.name != "errseg"
    if bool((outside > (total // 2 if rounds else 0)).any()):
        raise AssertionError(f"{outside.tolist()} votes beyond what rounding explains, of {total} per image")


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    dim, pixels = case.decoder.text_dim, case.os16**2
    flops = 2 * case.batch * case.words * dim * pixels
    reads = itemsize * numel((case.batch, dim, pixels), (case.words, dim))
    return product_counts(passing, flops, reads, 8 * numel((case.batch, case.words)))


TARGET = Target(
    name="class_votes",
    ops=("class_votes",),
    cases=(BASE, LARGE),
    quick=SMALL,
    sweeps=(
        *vary(BASE, words=(*T_AXIS, 3000, 10_000, 30_000, 100_000), batch=B_AXIS, size=SIZE_AXIS),
        EVAL_L,
        MILLION,
    ),
    inputs=_inputs,
    implementations={
        "errseg": lambda case: Implementation(ops.class_votes),
        "published": lambda case: Implementation(_published, partial(_in_memory, volumes=2)),
        "matmul+topk": lambda case: Implementation(
            _matmul_topk, _prepare_matmul_topk, lambda winners: _count(case.words, winners)
        ),
    },
    counts=_counts,
    check=_check,
    bars=(
        Bar(BASE, "forward", "cpu", "matmul+topk", times=1 / 1.1),
        Bar(LARGE, "forward", "cpu", "matmul+topk", times=1.0),
        Bar(BASE, "forward", "cpu", peak_bytes=64_000_000),
        Bar(LARGE, "forward", "cpu", peak_bytes=64_000_000),
    ),
)
