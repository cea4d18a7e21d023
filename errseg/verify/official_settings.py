"""Sizes at which this project and the published code run side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import errseg
from errseg.model.config import CONFIGS, ClipConfig, DecoderConfig, TextConfig, VisionConfig
from errseg.testing.inputs import random_decoder_weights, random_features, random_text_embeddings


@dataclass(frozen=True)
class Setting:
    """Sizes at which both run: a map of `side` at 1/16, K of T classes, a label map or target of `output`."""

    name: str
    clip: ClipConfig
    decoder: DecoderConfig
    side: tuple[int, int]
    num_selected: int
    words: int
    output: tuple[int, int]
    batch: int = 1
    gigabytes: float = 0.0  # in float64


_DIMS = (16, 32, 512, 1024)  # the published tower fixes its last two widths
SMALL_CLIP = ClipConfig(
    embed_dim=40,
    vision=VisionConfig(depths=(1, 1, 2, 1), dims=_DIMS),
    text=TextConfig(width=32, heads=2, layers=2),
    image_size=128,
)
SMALL_DECODER = DecoderConfig(
    text_dim=40,
    guidance_channels=_DIMS,
    width=32,
    num_layers=3,
    mlp_dim=96,
    embed_dim=24,
    guidance_dim=48,
    decoder_guidance=(8, 8, 8),
    decoder_dims=(16, 8, 8),
)
SMALL = Setting("small", SMALL_CLIP, SMALL_DECODER, (8, 6), 5, 13, (101, 77), batch=2)
SMALL_SQUARE = replace(SMALL, name="small, square", side=(10, 10), num_selected=7, words=40)
_BASE, _LARGE = CONFIGS["errseg-b"], CONFIGS["errseg-l"]
_MLP_HEAD = replace(SMALL_CLIP.vision, head="mlp", dims=(16, 32, 768, 1536))  # the widths that this head fixes
SMALL_MLP_HEAD = replace(SMALL, name="small, mlp head", clip=replace(SMALL_CLIP, vision=_MLP_HEAD))
_BASE_PICTURE = Setting("B 640, K 48, T 847", _BASE.clip, _BASE.decoder, (40, 40), 48, 847, (512, 683), gigabytes=5)
_LARGE_PICTURE = Setting("L 768, K 48, T 847", _LARGE.clip, _LARGE.decoder, (48, 48), 48, 847, (512, 683), gigabytes=9)
PUBLISHED = {
    "decoder, evaluation": (_BASE_PICTURE, _LARGE_PICTURE),
    "decoder, training": (
        Setting("B 320, K 32, T 171", _BASE.clip, _BASE.decoder, (20, 20), 32, 171, (320, 320), gigabytes=3),
        Setting("B 640, K 32, T 171", _BASE.clip, _BASE.decoder, (40, 40), 32, 171, (640, 640), gigabytes=10),
        Setting("L 768, K 32, T 171", _LARGE.clip, _LARGE.decoder, (48, 48), 32, 171, (768, 768), gigabytes=11),
    ),
    "image tower": (_BASE_PICTURE, _LARGE_PICTURE),
    "text tower": (_BASE_PICTURE, _LARGE_PICTURE),
    "whole model": (_BASE_PICTURE, _LARGE_PICTURE),
}


def decoder_inputs(setting: Setting, dtype: torch.dtype, device: torch.device) -> tuple[errseg.DenseFeatures, Tensor]:
    """Features and word embeddings [T, D] of a setting."""
    text = random_text_embeddings(setting.words, setting.decoder.text_dim, seed=2)
    features = random_features(
        setting.decoder, setting.batch, *setting.side, seed=3, text_embeddings=text, num_present=5
    )
    # At exactly 16 the clamp has two subgradients, and the two codes choose differently.
    inside = (t.where(t.abs() != 16, t * 0.96875) for t in features)
    return errseg.DenseFeatures(*(t.to(device, dtype) for t in inside)), text.to(device, dtype)


def decoder_weights(setting: Setting, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The decoder's weights under the published names."""
    return random_decoder_weights(setting.decoder, seed=1, dtype=dtype, device=device)
