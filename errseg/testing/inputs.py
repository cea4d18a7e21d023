"""Seeded sample inputs whose values bfloat16 holds exactly, so that one draw serves every precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.model.config import DecoderConfig

SMALL_DECODER = DecoderConfig(
    text_dim=40,
    guidance_channels=(8, 16, 32, 64),
    width=32,
    num_layers=2,
    mlp_dim=96,
    embed_dim=64,
    guidance_dim=48,
    decoder_guidance=(8, 8, 8),
    decoder_dims=(16, 8, 8),
)


class SampleFeatures(NamedTuple):
    """The fields of `errseg.DenseFeatures`, each [B, C, h, w]."""

    os4: Tensor
    os8: Tensor
    os16: Tensor
    os32: Tensor
    os16_dense: Tensor
    os32_dense: Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _exact(values: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Rounded to bfloat16, then given the wanted type."""
    return values.to(torch.bfloat16).to(device=device, dtype=dtype)


def random_tensor(
    *shape: int,
    seed: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal numbers with standard deviation `scale`."""
    return _exact(torch.randn(shape, generator=_generator(seed)) * scale, dtype, device)


def random_text_embeddings(
    vocabulary_size: int,
    text_dim: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Word embeddings [T, D] of length 1 up to rounding."""
    embeddings = torch.randn(vocabulary_size, text_dim, generator=_generator(seed))
    return _exact(F.normalize(embeddings, dim=-1), dtype, device)


def random_features(
    config: DecoderConfig,
    batch: int,
    height16: int,
    width16: int,
    *,
    seed: int,
    text_embeddings: Tensor | None = None,
    num_present: int = 6,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SampleFeatures:
    """Features of B images of height16 x width16 pixels at 1/16; 1/32 rounds down, 1/4 and 1/8 are multiples.

    A few taps lie beyond the clamp at 16. With `text_embeddings` [T, D] the pixels lean, in patches, to
    `num_present` words, so that votes differ clearly; without, the dense maps are noise.
    """
    generator = _generator(seed)

    def tap(channels: int, height: int, width: int) -> Tensor:
        values = 2 * torch.randn(batch, channels, height, width, generator=generator)
        spikes = torch.rand(values.shape, generator=generator) < 0.01
        return _exact(torch.where(spikes, 15 * values, values), dtype, device)

    def dense(height: int, width: int) -> Tensor:
        values = torch.randn(batch, config.text_dim, height, width, generator=generator)
        if text_embeddings is not None:
            ids = _patches(batch, height, width, len(text_embeddings), num_present, generator)
            leaning = text_embeddings.detach().to("cpu", torch.float32)[ids].permute(0, 3, 1, 2)
            values = values + 0.6 * math.sqrt(config.text_dim) * leaning
        return _exact(values, dtype, device)

    c4, c8, c16, c32 = config.guidance_channels
    height32, width32 = height16 // 2, width16 // 2
    return SampleFeatures(
        os4=tap(c4, 4 * height16, 4 * width16),
        os8=tap(c8, 2 * height16, 2 * width16),
        os16=tap(c16, height16, width16),
        os32=tap(c32, height32, width32),
        os16_dense=dense(height16, width16),
        os32_dense=dense(height32, width32),
    )


def _patches(
    batch: int, height: int, width: int, vocabulary_size: int, num_present: int, generator: torch.Generator
) -> Tensor:
    """Ids [B, H, W] in blocks, few different ones an image, some far more frequent than others."""
    words = torch.stack([torch.randperm(vocabulary_size, generator=generator) for _ in range(batch)])
    words = words[:, :num_present]
    share = torch.rand(batch, 4, 4, generator=generator).square()
    picks = (share * words.shape[1]).long().flatten(1)
    blocks = words.gather(1, picks).reshape(batch, 1, 4, 4).double()
    return F.interpolate(blocks, (height, width), mode="nearest").long()[:, 0]


def random_class_ids(
    batch: int, num_selected: int, vocabulary_size: int, *, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Distinct ids [B, min(K, T)] int64, ascending, different in every image."""
    generator = _generator(seed)
    drawn = [torch.randperm(vocabulary_size, generator=generator)[:num_selected] for _ in range(batch)]
    return torch.stack(drawn).sort(dim=1).values.to(device)


def random_logits(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Logits of standard deviation 4, a few saturated at 25 so that their float32 sigmoids tie at 1."""
    generator = _generator(seed)
    values = 4 * torch.randn(shape, generator=generator)
    saturated = torch.rand(shape, generator=generator) < 0.05
    return _exact(values.masked_fill(saturated, 25.0), dtype, device)


def random_target(
    batch: int,
    height: int,
    width: int,
    vocabulary_size: int,
    *,
    seed: int,
    ignore_index: int = 255,
    ignored: float = 0.1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Ground truth [B, H, W] int64, the share `ignored` of its pixels set to `ignore_index`."""
    generator = _generator(seed)
    target = torch.randint(vocabulary_size, (batch, height, width), generator=generator)
    hidden = torch.rand(target.shape, generator=generator) < ignored
    return target.masked_fill(hidden, ignore_index).to(device)


def random_decoder_weights(
    config: DecoderConfig,
    *,
    seed: int,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """A state dict under the published names, drawn so that no part is idle.

    Norms have uneven scales and shifts, biases are not zero, queries are large enough for uneven attention.
    """
    from errseg.testing.published_decoder import PublishedDecoder

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in PublishedDecoder(config).state_dict().items()}
    generator = _generator(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1 and name.endswith("weight"):  # a norm
            values = 1 + 0.25 * noise
        elif len(shape) == 1:
            values = 0.1 * noise
        else:
            gain = 2.0 if ".attention.q." in name or ".attention.k." in name else 1.2
            values = noise * gain / math.sqrt(math.prod(shape[1:]))
        weights[prefix + name] = _exact(values, dtype, device)
    return weights
