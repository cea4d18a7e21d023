"""Parameters composed once give what composing them in every call gives, until they change."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.model.decoder import Decoder
from errseg.testing import assert_close
from errseg.testing.inputs import SMALL_DECODER, random_features, random_text_embeddings

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 0.05}  # tensors lie otherwise in memory
FOLDS = [
    *(ops.CostEmbeddingParams, ops.SpatialAttentionParams),
    *(ops.GatedMLPParams, ops.ClassAttentionParams),
]


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SMALL_DECODER).eval()


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    dtype = next(decoder.parameters()).dtype
    features = random_features(SMALL_DECODER, 2, 4, 6, seed=1, dtype=dtype)
    words = random_text_embeddings(9, SMALL_DECODER.text_dim, seed=2, dtype=dtype)
    return decoder(features, words, num_selected=4).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_composing_in_every_call(decoder: Decoder, dtype: torch.dtype) -> None:
    decoder.to(dtype)
    wanted = logits(decoder)
    decoder.keep_folded()
    assert_close(logits(decoder), wanted, TOLERANCE[dtype])


def test_nothing_is_composed_any_more(decoder: Decoder) -> None:
    def refuse(self: object) -> None:
        raise AssertionError(f"{type(self).__name__} is folded")

    decoder.keep_folded()
    for params in FOLDS:
        patch.object(params, "fold", refuse).start()
    try:
        logits(decoder)
        decoder.train()
        with pytest.raises(AssertionError, match="is folded"):
            logits(decoder)
    finally:
        patch.stopall()


def _load(decoder: Decoder) -> None:
    torch.manual_seed(1)
    decoder.load_state_dict(Decoder(SMALL_DECODER).state_dict())


@pytest.mark.parametrize("change", [_load, Decoder.double, lambda decoder: decoder.train().eval()])
def test_changed_parameters_are_seen(decoder: Decoder, change: Callable[[Decoder], object]) -> None:
    decoder.keep_folded()
    change(decoder)
    found = logits(decoder)
    decoder.keep_folded()
    assert_close(logits(decoder), found, TOLERANCE[found.dtype])
    twin = Decoder(SMALL_DECODER).to(found.dtype).eval()
    twin.load_state_dict(decoder.state_dict())
    assert torch.equal(logits(twin), found)


def test_state_dict_stays_the_published_one(decoder: Decoder) -> None:
    names = list(decoder.published_state_dict())
    decoder.keep_folded()
    assert list(decoder.published_state_dict()) == names
