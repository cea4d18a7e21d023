"""Sample inputs: seeded, exact in bfloat16, and lively enough to tell right from wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import errseg.testing
from errseg.testing import inputs
from errseg.testing.inputs import SMALL_DECODER
from errseg.testing.published_decoder import (
    PublishedDecoder,
    published_cost_volume,
    published_votes,
    trace_intermediates,
)


def draws(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    text = inputs.random_text_embeddings(30, 40, seed=seed, dtype=dtype)
    features = inputs.random_features(SMALL_DECODER, 2, 7, 9, seed=seed, text_embeddings=text, dtype=dtype)
    weights = inputs.random_decoder_weights(SMALL_DECODER, seed=seed, dtype=dtype)
    logits = inputs.random_logits(2, 5, 6, 7, seed=seed, dtype=dtype)
    return [text, *features, *weights.values(), logits, inputs.random_tensor(4, 5, seed=seed, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_draw_serves_every_precision(dtype: torch.dtype) -> None:
    for exact, narrow in zip(draws(3, dtype), draws(3, torch.bfloat16), strict=True):
        assert exact.dtype == dtype
        assert torch.equal(exact, narrow.to(dtype))


def test_seeds_differ() -> None:
    assert not any(
        torch.equal(one, other) for one, other in zip(draws(1, torch.float32), draws(2, torch.float32), strict=True)
    )


def test_feature_shapes_and_spikes() -> None:
    features = inputs.random_features(SMALL_DECODER, 2, 7, 9, seed=0)
    shapes = {name: tuple(value.shape) for name, value in features._asdict().items()}
    assert shapes == {
        "os4": (2, 8, 28, 36),
        "os8": (2, 16, 14, 18),
        "os16": (2, 32, 7, 9),
        "os32": (2, 64, 3, 4),
        "os16_dense": (2, 40, 7, 9),
        "os32_dense": (2, 40, 3, 4),
    }
    for tap in features[:4]:
        assert 0 < (tap.abs() > 16).float().mean() < 0.05


def test_leaning_features_give_clear_votes() -> None:
    text = inputs.random_text_embeddings(171, 640, seed=0)
    config = SMALL_DECODER.__class__(text_dim=640, guidance_channels=(8, 8, 8, 8))
    features = inputs.random_features(config, 1, 20, 20, seed=0, text_embeddings=text)
    votes = published_votes(published_cost_volume(features.os16_dense, text))[0]
    first = votes.sort(descending=True).values
    assert first[0] > 5000
    assert first[2] > 1500
    assert first[6] < 0.2 * first[2]


def test_random_decoder_is_lively() -> None:
    text = inputs.random_text_embeddings(30, 40, seed=0, dtype=torch.float64)
    features = inputs.random_features(SMALL_DECODER, 1, 8, 10, seed=0, dtype=torch.float64)
    weights = inputs.random_decoder_weights(SMALL_DECODER, seed=0, dtype=torch.float64)
    ids = inputs.random_class_ids(1, 6, 30, seed=0)
    with torch.no_grad():
        found = trace_intermediates(PublishedDecoder.from_published(weights).eval(), features, text, ids)
    assert all(value.isfinite().all() for value in found.values())
    assert 0.1 < found["logits"].std() < 20
    assert found["layer1.spatial_attn_out"].std(dim=(3, 4)).mean() > 0.02  # uniform attention would be flat


def test_class_ids_and_targets() -> None:
    ids = inputs.random_class_ids(3, 5, 20, seed=0)
    assert ids.shape == (3, 5)
    assert (ids.diff(dim=1) > 0).all()
    assert inputs.random_class_ids(1, 9, 4, seed=0).tolist() == [[0, 1, 2, 3]]
    target = inputs.random_target(2, 30, 40, 20, seed=0)
    assert 0.05 < (target == 255).float().mean() < 0.15
    assert target[target != 255].max() < 20
    assert (inputs.random_target(1, 4, 4, 3, seed=0, ignored=1.0) == 255).all()


def test_public_names_resolve_without_pytest() -> None:
    for name in errseg.testing.__all__:
        assert getattr(errseg.testing, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        errseg.testing.nothing_like_this  # noqa: B018
    code = (
        "import sys, errseg.testing as t; [getattr(t, n) for n in t.__all__];"
        "sys.exit('pytest' in sys.modules or 'open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
