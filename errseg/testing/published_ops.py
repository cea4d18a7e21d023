"""Every op in the published order of operations, in eager PyTorch: what an op's error is measured beside.

Each function takes a :class:`~errseg.testing.samples.Sample` and answers what its op answers, in the call's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops import UpStepParams
from errseg.testing.published_decoder import (
    ClassBlock,
    SpatialAttention,
    UpDecoderStep,
    published_cost_volume,
    published_dense,
    published_loss,
    published_selection,
    published_votes,
)
from errseg.testing.samples import Sample


def published(call: Sample) -> Any:
    """The result of a call in the published order of operations."""
    return PUBLISHED_OPS[call.function.__name__](call)


def class_votes(call: Sample) -> Tensor:
    """Cosines of all words, then the best three of each pixel."""
    images, text = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in call.args)
    return published_votes(published_cost_volume(images, text))


def select_classes(call: Sample) -> Tensor:
    """A Python sort by votes and id."""
    votes, num_selected = call.args
    return published_selection(votes, num_selected, call.kwargs.get("required"))


def cost_volume(call: Sample) -> Tensor:
    """Cosines of all words, then the selected ones."""
    images, text, ids = call.args
    volume = published_cost_volume(images, text)
    return volume.gather(1, ids[:, :, None, None].expand(-1, -1, *volume.shape[2:]))


def cost_embedding(call: Sample) -> Tensor:
    """Both 7x7 convolutions to E channels, mean at 1/16, then the 1x1."""
    cost16, cost32, p = call.args
    fine = F.conv2d(cost16.flatten(0, 1)[:, None], p.conv16_weight, p.conv16_bias, padding=3)
    coarse = F.conv2d(cost32.flatten(0, 1)[:, None], p.conv32_weight, p.conv32_bias, padding=3)
    coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
    out = F.conv2d((fine + coarse) / 2, p.fusion_weight, p.fusion_bias)
    return out.permute(0, 2, 3, 1).unflatten(0, cost16.shape[:2])


def gated_mlp(call: Sample) -> Tensor:
    """LayerNorm with its affine part, then the three linears."""
    x, p = call.args
    z = F.layer_norm(x, x.shape[-1:], p.norm_weight, p.norm_bias)
    gate, value = F.linear(z, p.fc1_weight, p.fc1_bias), F.linear(z, p.fc2_weight, p.fc2_bias)
    return F.linear(F.relu6(gate) * value, p.fc3_weight, p.fc3_bias)


def depthwise_conv(call: Sample) -> Tensor:
    """A grouped convolution on channel-major maps."""
    x, weight, bias, residual, mask = call.args
    image = x.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()
    out = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    out = out.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2)
    out = out if mask is None else out * mask[:, :, None, None, None]
    return out if residual is None else residual + out


def spatial_attention(call: Sample) -> Tensor:
    """Guidance repeated for every class and concatenated, two strided convolutions, three LayerNorms."""
    x, guidance, p = call.args
    height, width, channels = x.shape[2:]
    with torch.device("meta"):
        block = SpatialAttention(channels, call.kwargs["num_heads"])
    tensors = {name.replace("_weight", ".weight").replace("_bias", ".bias"): t for name, t in vars(p).items()}
    gamma, beta = tensors.pop("norm.weight"), tensors.pop("norm.bias")
    tokens = x.flatten(0, 1).flatten(1, 2)
    z = F.layer_norm(tokens, (channels,), gamma, beta)
    repeated = guidance[:, None].expand_as(x).flatten(0, 1).flatten(1, 2)
    out = torch.func.functional_call(block, tensors, (z, repeated, (height, width))).reshape(x.shape)
    mask = call.kwargs.get("drop_path")
    return x + (out if mask is None else out * mask[:, :, None, None, None])


def class_attention(call: Sample) -> Tensor:
    """Average pooling, text repeated for every pixel and concatenated, attention, MLP, ReLU6."""
    x, text, p = call.args
    batch, classes, height, width, channels = x.shape
    tensors = {"norm1.weight": p.norm_weight, "norm1.bias": p.norm_bias}
    for layer in ("q", "k", "v", "proj"):
        tensors |= {f"attention.{layer}.{kind}": getattr(p, f"{layer}_{kind}") for kind in ("weight", "bias")}
    tensors |= {"norm2.weight": p.mlp.norm_weight, "norm2.bias": p.mlp.norm_bias}
    for layer in ("fc1", "fc2", "fc3"):
        tensors |= {f"mlp.{layer}.{kind}": getattr(p.mlp, f"{layer}_{kind}") for kind in ("weight", "bias")}
    pooled = F.avg_pool2d(x.permute(0, 1, 4, 2, 3).flatten(0, 1), 2)
    height, width = pooled.shape[2:]
    tokens = pooled.unflatten(0, (batch, classes)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # [B h w, K, C]
    repeated = text[:, None, None].expand(-1, height, width, -1, -1).flatten(0, 2)
    with torch.device("meta"):
        block = ClassBlock(channels, call.kwargs["num_heads"], p.mlp.fc1_weight.shape[0], 0.0)
    masks = call.kwargs.get("drop_path")
    if masks is not None:
        pair = masks if isinstance(masks, tuple) else (masks, masks)
        block.drop_path = _GivenMasks([mask.flatten()[:, None, None] for mask in pair])  # type: ignore[assignment]
    out = torch.func.functional_call(block, tensors, (tokens, repeated))
    return out.reshape(batch, height, width, classes, channels).permute(0, 3, 1, 2, 4)


def upsample_residual(call: Sample) -> Tensor:
    """Bilinear interpolation of channel-major maps, back to tokens, residual."""
    x, residual = call.args
    image = x.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()
    image = F.interpolate(image, size=residual.shape[2:4], mode="bilinear", align_corners=True)
    return residual + image.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2)


def up_step(call: Sample) -> Tensor:
    """The upsampled map with the guidance, repeated for every class and concatenated, through both convolutions."""
    x, guidance, p = call.args
    with torch.device("meta"):
        up: torch.nn.Module = torch.nn.Conv2d(x.shape[4], len(p.up_bias), 1)
        if p.up_weight.shape[-1] == 2:
            up = torch.nn.ConvTranspose2d(x.shape[4], len(p.up_bias), 2, stride=2)
        step = UpDecoderStep(up, len(p.up_bias), guidance.shape[1])
    tensors = published_up_step(p)
    maps = x.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()
    maps = torch.func.functional_call(step, tensors, (maps, guidance))
    return maps.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2)


def published_up_step(p: UpStepParams) -> dict[str, Tensor]:
    """The tensors of a step by their published names."""
    return {
        "up_conv.weight": p.up_weight,
        "up_conv.bias": p.up_bias,
        "textual_fusion.0.weight": p.conv1_weight,
        "textual_fusion.1.weight": p.norm1_weight,
        "textual_fusion.1.bias": p.norm1_bias,
        "textual_fusion.3.weight": p.conv2_weight,
        "textual_fusion.4.weight": p.norm2_weight,
        "textual_fusion.4.bias": p.norm2_bias,
    }


class _GivenMasks(torch.nn.Module):
    """Drop path whose masks are given, one per call."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = iter(masks)

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.masks).to(x.dtype)


def upsample_argmax(call: Sample) -> Tensor | tuple[Tensor, Tensor]:
    """Sigmoid, bilinear, argmax over all classes at once, brought into the order of their ids."""
    logits, ids, size = call.args
    ids, order = ids.sort(dim=1)
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    probabilities = probabilities.gather(1, order[:, :, None, None].expand_as(probabilities))
    probabilities = F.interpolate(probabilities, size=size, mode="bilinear", align_corners=False)
    scores, rows = probabilities.max(dim=1)
    labels = ids.gather(1, rows.flatten(1)).reshape(rows.shape).to(torch.int32)
    return (labels, scores) if call.kwargs.get("return_scores") else labels


def upsample_bce(call: Sample) -> Tensor:
    """Logits scattered over the vocabulary, bilinear, one-hot targets, mean over all elements."""
    logits, ids, target = call.args
    options = call.kwargs
    vocabulary_size, ignore_index = options["vocabulary_size"], options.get("ignore_index", 255)
    target = target.long()
    target = target.where((target >= 0) & (target < vocabulary_size), ignore_index)
    dense = published_dense(logits, ids, vocabulary_size)
    if not options.get("exclude_ignored"):
        return published_loss(dense, target, ignore_index)
    counted = target != ignore_index
    upsampled = F.interpolate(dense, target.shape[-2:], mode="bilinear", align_corners=False).movedim(1, -1)[counted]
    truth = F.one_hot(target[counted], vocabulary_size).to(upsampled.dtype)
    total = F.binary_cross_entropy_with_logits(upsampled, truth, reduction="sum")
    return total / (max(1, len(upsampled)) * vocabulary_size)


PUBLISHED_OPS: dict[str, Callable[[Sample], Any]] = {
    "class_votes": class_votes,
    "select_classes": select_classes,
    "cost_volume": cost_volume,
    "cost_embedding": cost_embedding,
    "gated_mlp": gated_mlp,
    "depthwise_conv": depthwise_conv,
    "spatial_attention": spatial_attention,
    "class_attention": class_attention,
    "upsample_residual": upsample_residual,
    "up_step": up_step,
    "upsample_argmax": upsample_argmax,
    "upsample_bce": upsample_bce,
}
