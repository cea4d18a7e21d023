"""RRCA: attention over space, then over classes, on shortened sequences (paper: RRCA).

Token-major throughout: x is [B, K, H, W, C].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from errseg import ops
from errseg.model.config import DecoderConfig
from errseg.model.folding import Foldable


class DropPath(nn.Module):
    """The probability at which a block drops each of its two branches in training; `drop_prob`, as timm has it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class GatedMLP(Foldable):
    """Parameters of the gated MLP; the spatial block's has a depthwise convolution too."""

    def __init__(self, width: int, hidden: int, *, depthwise: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(width, hidden)
        self.fc3 = nn.Linear(hidden, width)
        if depthwise:
            self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)

    def published_params(self, *norms: nn.LayerNorm) -> ops.GatedMLPParams:
        """The published tensors as the op takes them, with the LayerNorm before them."""
        (norm,) = norms
        fc1, fc2, fc3 = self.fc1, self.fc2, self.fc3
        return ops.GatedMLPParams(
            norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, fc3.weight, fc3.bias
        )


class SpatialAttention(Foldable):
    """Parameters of the attention among pixels; keys and values come from strided windows."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.q = nn.Linear(2 * width, width)
        self.k = nn.Linear(2 * width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.sr_k = nn.Conv2d(2 * width, 2 * width, stride, stride=stride)
        self.norm_k = nn.LayerNorm(2 * width)
        self.sr_v = nn.Conv2d(width, width, stride, stride=stride)
        self.norm_v = nn.LayerNorm(width)

    def published_params(self, *norms: nn.LayerNorm) -> ops.SpatialAttentionParams:
        """The published tensors as the op takes them, with the LayerNorm before them."""
        (norm,) = norms
        tensors = {"norm_weight": norm.weight, "norm_bias": norm.bias}
        for name, layer in self.named_children():
            tensors |= {f"{name}_{kind}": value for kind, value in layer.named_parameters()}
        return ops.SpatialAttentionParams(**tensors)


class SpatialBlock(nn.Module):
    """Attention among the pixels of each class, then gated MLP and depthwise convolution."""

    def __init__(self, width: int, hidden: int, num_heads: int, drop_path: float, stride: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop_path: nn.Module = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(width)
        self.attention = SpatialAttention(width, stride)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = GatedMLP(width, hidden, depthwise=True)

    def keep_folded(self) -> None:
        """Compose the parameters once, for inference."""
        self.attention.keep_folded(self.norm1)
        self.mlp.keep_folded(self.norm2)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """[B, K, H, W, C], guidance [B, H, W, C] -> [B, K, H, W, C]; one drop-path mask per (image, class)."""
        rate = drop_rate(self.drop_path)
        x = ops.spatial_attention(
            x,
            guidance,
            self.attention.params(self.norm1),
            num_heads=self.num_heads,
            drop_path=drop_path_mask(x, x.shape[:2], rate),
        )
        hidden = ops.gated_mlp(x, self.mlp.params(self.norm2))
        conv = self.mlp.dwconv
        mask = drop_path_mask(x, x.shape[:2], rate)
        return ops.depthwise_conv(hidden, conv.weight, conv.bias, residual=x, drop_path=mask)


class ClassAttention(nn.Module):
    """Parameters of the attention among classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(2 * width, width)
        self.k = nn.Linear(2 * width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)


class ClassBlock(Foldable):
    """Attention among the classes of each pooled pixel, brought back by bilinear upsampling."""

    def __init__(self, width: int, hidden: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop_path: nn.Module = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(width)
        self.attention = ClassAttention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = GatedMLP(width, hidden, depthwise=False)

    def published_params(self, *norms: nn.LayerNorm) -> ops.ClassAttentionParams:
        """The published tensors as the op takes them."""
        tensors = {"norm_weight": self.norm1.weight, "norm_bias": self.norm1.bias}
        for name, layer in self.attention.named_children():
            tensors |= {f"{name}_{kind}": value for kind, value in layer.named_parameters()}
        return ops.ClassAttentionParams(**tensors, mlp=self.mlp.published_params(self.norm2))

    def forward(self, x: Tensor, text_guidance: Tensor) -> Tensor:
        """[B, K, H, W, C], text [B, K, C] -> [B, K, H, W, C]; a drop-path mask per (image, pooled pixel) and branch."""
        batch, _, height, width, _ = x.shape
        rate = drop_rate(self.drop_path)
        shape = (batch, height // 2, width // 2)
        masks = drop_path_mask(x, shape, rate), drop_path_mask(x, shape, rate)
        pair = None if masks[0] is None or masks[1] is None else (masks[0], masks[1])
        low = ops.class_attention(x, text_guidance, self.params(), num_heads=self.num_heads, drop_path=pair)
        return ops.upsample_residual(low, x)


class RRCALayer(nn.Module):
    """One spatial block, then one class block."""

    def __init__(self, config: DecoderConfig, drop_path: float) -> None:
        super().__init__()
        self.spatial = SpatialBlock(config.width, config.mlp_dim, config.num_heads, drop_path)
        self.classes = ClassBlock(config.width, config.mlp_dim, config.num_heads, drop_path)

    def forward(self, x: Tensor, guidance: Tensor, text_guidance: Tensor) -> Tensor:
        """[B, K, H, W, C] -> [B, K, H, W, C]."""
        return self.classes(self.spatial(x, guidance), text_guidance)


class RRCA(nn.Module):
    """Redundancy-reduced context aggregation: a stack of layers; layer i drops paths with i times the rate."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RRCALayer(config, i * config.drop_path_rate) for i in range(config.num_layers))
        self.apply(_init_weights)

    def keep_folded(self) -> None:
        """Compose the parameters once, for inference."""
        for layer in self.layers:
            assert isinstance(layer, RRCALayer)
            layer.spatial.keep_folded()
            layer.classes.keep_folded()

    def forward(self, x: Tensor, guidance: Tensor, text_guidance: Tensor) -> Tensor:
        """Refine the cost embedding x [B, K, H, W, C] with guidance [B, H, W, C] and text guidance [B, K, C]."""
        for layer in self.layers:
            x = layer(x, guidance, text_guidance)
        return x


def drop_rate(drop_path: nn.Module) -> float:
    """The probability now in force: 0 in evaluation, and for a stand-in that has none."""
    rate = getattr(drop_path, "drop_prob", None) if drop_path.training else None
    return 0.0 if rate is None else float(rate)


def drop_path_mask(x: Tensor, shape: tuple[int, ...], rate: float) -> Tensor | None:
    """0 for a dropped branch, one over the keep probability for a kept one; ``None`` at rate 0."""
    if rate == 0.0:
        return None
    keep = 1.0 - rate
    return torch.empty(shape, dtype=torch.float32, device=x.device).bernoulli_(keep).div_(keep)


def _init_weights(module: nn.Module) -> None:
    """Published initialisation: linears N(0, 0.02) cut at +-2, convolutions N(0, 2 / fan_out), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
