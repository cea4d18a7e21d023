"""What the picture and the words tell every class: guidance for RRCA and for the up-decoder (paper: RRCA)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from errseg.model.clip import DenseFeatures
from errseg.model.config import DecoderConfig
from errseg.ops.precision import at_least_float32

CLAMP = 16.0  # range of the taps that guidance reads


class GuidanceMaps(NamedTuple):
    """What the pictures of one batch give: aggregation [B, H, W, C] for the spatial blocks; decoder: one map per
    up-decoder step, [B, ., H, W], [B, ., 2H, 2W], [B, ., 4H, 4W].
    """

    aggregation: Tensor
    decoder: tuple[Tensor, Tensor, Tensor]


class AggregationGuidance(nn.Module):
    """Mean of os32 and os16 through 3x3 convolutions and ReLU6, projected to C: [B, H, W, C]."""

    def __init__(self, os16_channels: int, os32_channels: int, hidden: int, width: int) -> None:
        super().__init__()
        self.conv32 = nn.Conv2d(os32_channels, hidden, 3, padding=1)
        self.conv16 = nn.Conv2d(os16_channels, hidden, 3, padding=1)
        self.fusion = nn.Conv2d(hidden, width, 1)

    def forward(self, os16: Tensor, os32: Tensor) -> Tensor:
        """The 1x1 projection commutes with the bilinear upsampling, so it runs at 1/32 where it is cheaper."""
        weight = 0.5 * self.fusion.weight
        coarse = F.conv2d(F.relu6(self.conv32(os32)), weight)
        fine = F.conv2d(F.relu6(self.conv16(os16)), weight, self.fusion.bias)
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return (fine + coarse).permute(0, 2, 3, 1).contiguous()


class Guidance(nn.Module):
    """Image guidance at three resolutions and text guidance of the selected classes."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        os4, os8, os16, os32 = config.guidance_channels
        self.aggregation = AggregationGuidance(os16, os32, config.guidance_dim, config.width)
        self.decoder = nn.ModuleList(
            nn.Conv2d(channels, out, 3, padding=1)
            for channels, out in zip((os16, os8, os4), config.decoder_guidance, strict=True)
        )
        self.text = nn.Linear(config.text_dim, config.width)

    def forward(self, features: DenseFeatures) -> GuidanceMaps:
        """Guidance from the taps, clamped to [-16, 16]. The up-decoder's share of os16 is detached, as published."""
        os4, os8, os16, os32 = (tap.clamp(-CLAMP, CLAMP) for tap in features[:4])
        maps = tuple(F.relu6(conv(tap)) for conv, tap in zip(self.decoder, (os16.detach(), os8, os4), strict=True))
        return GuidanceMaps(self.aggregation(os16, os32), (maps[0], maps[1], maps[2]))

    def of_words(self, text_embeddings: Tensor, class_ids: Tensor) -> Tensor:
        """Guidance [B, K, C] for the class blocks, from the rows ``class_ids`` of the words."""
        words = F.normalize(at_least_float32(text_embeddings[class_ids]), dim=-1, eps=1e-12)
        return F.gelu(self.text(words.to(self.text.weight.dtype)))
