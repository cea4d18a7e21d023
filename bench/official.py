"""The provider `official`: the decoder of a user's checkout of the published ERR-Seg code.

It chooses its classes itself, ties as it happens. Its loss is written into its meta architecture; in `train` the same
loss stands behind its decoder.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from errseg.bench.cases import Case
from errseg.bench.registry import Implementation, Inputs
from errseg.errors import ErrSegError
from errseg.testing.inputs import random_decoder_weights
from errseg.testing.published_decoder import UNSELECTED_LOGIT, published_loss
from errseg.verify.checkout import load_official

TARGETS = ("head", "train")

_load = functools.cache(load_official)


def implementation(target: str, case: Case, checkout: Path) -> Implementation:
    """`head` or `train` with the checkout's decoder and the case's weights; raises ErrSegError without one."""
    if target not in TARGETS:
        raise ErrSegError(f"{target} has no official: choose out of {', '.join(TARGETS)}")
    decoder = _load(checkout).decoder(case.decoder, case.kept)
    decoder.load_state_dict(random_decoder_weights(case.decoder, seed=7))
    weights: Callable[[nn.Module], dict[str, Tensor]] = lambda module: dict(module.named_parameters())  # noqa: E731
    if target == "head":
        return Implementation(_head, _prepare_head, _selected, module=decoder.eval(), weights=weights)
    canonical = lambda result: (result[0], _selected(result[1])[1])  # noqa: E731
    return Implementation(_train, _prepare_train, canonical, module=decoder.train(), weights=weights)


def _prepare_head(inputs: Inputs) -> Inputs:
    """Pixel embeddings, words once per image, taps coarse to fine (clones: they are clamped in place)."""
    features, text = inputs[:2]
    batch = features.os16.shape[0]
    taps = [t.clone() for t in (features.os32, features.os16, features.os8, features.os4)]
    return [features.os16_dense, features.os32_dense], text[None, :, None].repeat(batch, 1, 1, 1), taps, None


def _prepare_train(inputs: Inputs) -> Inputs:
    """The same with the classes of each target, and the target."""
    target = inputs[4]
    truth = [ids[ids != 255] for ids in (t.unique() for t in target)]
    return (*_prepare_head(inputs)[:3], truth, target)


def _head(module: nn.Module, *arguments: Any) -> Tensor:
    """Dense logits [B, T, 4H, 4W]."""
    with _histogram_of_integers(arguments[1]):
        dense: Tensor = module(*arguments)
    return dense


def _train(module: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and dense logits."""
    dense = _head(module, *arguments[:-1])
    return published_loss(dense, arguments[-1]), dense


def _selected(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and ascending ids of the classes that are there."""
    there = (dense != UNSELECTED_LOGIT).flatten(2).any(2)
    ids = torch.stack([image.nonzero().flatten() for image in there])
    return dense.gather(1, ids[:, :, None, None].expand(-1, -1, *dense.shape[2:])), ids


@contextlib.contextmanager
def _histogram_of_integers(like: Tensor) -> Iterator[None]:
    """The published code counts integers, for which PyTorch has a kernel on GPUs only."""
    if like.device.type != "cpu":
        yield
        return
    histc = torch.histc
    with patch.object(torch, "histc", lambda values, *args, **kwargs: histc(values.double(), *args, **kwargs)):
        yield
