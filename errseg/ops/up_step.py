"""A step of the up-decoder: maps brought up, guidance, and two convolutions, each with GroupNorm and ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops import reference, triton_backend
from errseg.ops.checks import expect, expect_floating, expect_shape
from errseg.ops.contract import Op
from errseg.ops.precision import at_least_float32, without_autocast

GROUP_CHANNELS = 8  # of both norms
GROUP_NORM_EPS = 1e-5


class FoldedUpStep(NamedTuple):
    """The first convolution split into what a class has of its own and what all classes of an image share."""

    up_weight: Tensor | None  # [C', C], of a step that keeps the size
    weight1: Tensor  # [C', C', 3, 3]; of a step that doubles it [2, 2, C', C, 2, 2], a window per output phase
    shared_weight: Tensor  # [C', G + 1, 3, 3], over the guidance and a channel of ones
    norm1_weight: Tensor  # [C']
    norm1_bias: Tensor  # [C']
    weight2: Tensor  # [C', C', 3, 3]
    norm2_weight: Tensor  # [C']
    norm2_bias: Tensor  # [C']


@dataclass(frozen=True)
class UpStepParams:
    """Published tensors: what brings the maps up (up_conv), two convolutions 3x3 without bias and their norms."""

    up_weight: Tensor  # [C', C, 1, 1] of a convolution; [C, C', 2, 2] of a transposed one, of stride 2
    up_bias: Tensor  # [C']
    conv1_weight: Tensor  # [C', C' + G, 3, 3]   textual_fusion.0
    norm1_weight: Tensor  # [C']                 textual_fusion.1
    norm1_bias: Tensor  # [C']
    conv2_weight: Tensor  # [C', C', 3, 3]       textual_fusion.3
    norm2_weight: Tensor  # [C']                 textual_fusion.4
    norm2_bias: Tensor  # [C']

    @without_autocast
    def fold(self) -> FoldedUpStep:
        """Split and compose the first convolution.

        Its guidance part and the bias before it are the same for all classes of an image. The bias ends where the map
        does, as zero padding has it: it is a channel of ones. A 3x3 convolution after the transposed one is, for each
        of the 2x2 output phases, a 2x2 convolution of the smaller map.
        """
        conv1, channels = at_least_float32(self.conv1_weight), self.up_bias.shape[0]
        own, guidance = conv1[:, :channels], conv1[:, channels:]
        of_bias = torch.einsum("omyx,m->oyx", own, at_least_float32(self.up_bias))
        shared = torch.cat((guidance, of_bias[:, None]), dim=1)
        up = at_least_float32(self.up_weight)
        keeps_size = up.shape[-1] == 1
        return FoldedUpStep(
            up[:, :, 0, 0] if keeps_size else None,
            own if keeps_size else _by_phase(own, up),
            shared,
            self.norm1_weight,
            self.norm1_bias,
            self.conv2_weight,
            self.norm2_weight,
            self.norm2_bias,
        )


def _by_phase(own: Tensor, up: Tensor) -> Tensor:
    """[C', M, 3, 3] after [C, M, 2, 2] transposed -> [2, 2, C', C, 2, 2].

    Padded to 4x4, a window begins at the first corner of a 2x2 block: it covers two blocks by two, each of them made
    of one pixel of the smaller map.
    """
    phases = []
    for i in range(2):
        for j in range(2):
            blocks = F.pad(own, (1 - j, j, 1 - i, i)).unflatten(3, (2, 2)).unflatten(2, (2, 2))
            phases.append(torch.einsum("omyaxb,cmab->ocyx", blocks, up))
    return torch.stack(phases).unflatten(0, (2, 2))


def _fake(x: Tensor, added: Tensor, *weights_and_options: object) -> Tensor:
    return x.new_empty((*x.shape[:2], *added.shape[1:]))


OP = Op(
    "up_step",
    "(Tensor x, Tensor added, Tensor weight1, Tensor norm1_weight, Tensor norm1_bias, Tensor weight2, "
    "Tensor norm2_weight, Tensor norm2_bias, int groups, float eps) -> Tensor",
    reference=reference.up_step,
    fake=_fake,
    differentiable=(
        *("x", "added", "weight1", "norm1_weight", "norm1_bias"),
        *("weight2", "norm2_weight", "norm2_bias"),
    ),
)

MAX_TRITON_CHANNELS = 128  # a program sums up all output channels of its pixels in registers


def _triton_can_run(x: Tensor, added: Tensor, *rest: object) -> str | None:
    tensors = [x, added, *(t for t in rest if isinstance(t, Tensor))]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        return f"one dtype, got {', '.join(sorted(map(str, dtypes)))}"
    channels = max(x.shape[-1], added.shape[-1])
    if channels > MAX_TRITON_CHANNELS:
        return f"up to {MAX_TRITON_CHANNELS} channels, got {channels}"
    if added.shape[1:3].numel() * channels >= 2**31:
        return f"maps of less than 2**31 numbers, got {list(added.shape)}"
    return triton_backend.sides_fit(*added.shape[1:3])


OP.register("triton", triton_backend.backend("up_step", can_run=_triton_can_run))


def up_step(
    x: Tensor,
    guidance: Tensor,
    params: UpStepParams | FoldedUpStep,
    *,
    eps: float = GROUP_NORM_EPS,
    backend: str | None = None,
) -> Tensor:
    """Bring class maps up, add guidance, and refine: ``up``, then twice ``ReLU(GroupNorm(conv3x3))``.

    The first convolution runs over ``[up(x), guidance]``. Its guidance part is computed once per image.

    Args:
        x: [B, K, H, W, C].
        guidance: [B, G, H', W'], H' = H for a 1x1 ``up``, 2H for a transposed one, and W' alike.
        params: published tensors, or their ``fold()``; C' is a multiple of 8, the channels of a group.
        eps: of both norms.
        backend: strict choice of a backend.

    Returns:
        [B, K, H', W', C'] in the dtype of ``x``.

    Raises:
        ValueError: on wrong shapes.

    Source: paper, up-decoder.
    """
    folded = params.fold() if isinstance(params, UpStepParams) else params
    up_weight, weight1 = folded.up_weight, folded.weight1
    channels = weight1.shape[-3] if up_weight is None else up_weight.shape[1]
    expect_floating(x, 5, f"x [B, K, H, W, {channels}] floating")
    expect(x.shape[-1] == channels, f"x [B, K, H, W, {channels}] floating", x)
    expect(x.shape[2:4].numel() > 0, "x of at least one pixel", x)
    scale = 1 if weight1.ndim == 4 else 2
    out_channels, guides = folded.shared_weight.shape[0], folded.shared_weight.shape[1] - 1
    expect_shape(guidance, (x.shape[0], guides, scale * x.shape[2], scale * x.shape[3]), "guidance")
    expect(out_channels % GROUP_CHANNELS == 0, f"C' a multiple of {GROUP_CHANNELS}", out_channels)

    if up_weight is not None:
        x = F.linear(x, up_weight.to(x.dtype))
    with_ones = F.pad(guidance.to(x.dtype), (0, 0, 0, 0, 0, 1), value=1.0)
    with_ones = with_ones.contiguous(memory_format=torch.channels_last)
    added = F.conv2d(with_ones, folded.shared_weight.to(x.dtype), padding=1).permute(0, 2, 3, 1)
    tensors = added, weight1, *folded[3:]
    return OP(x, *(t.to(x.dtype) for t in tensors), out_channels // GROUP_CHANNELS, eps, backend=backend)
