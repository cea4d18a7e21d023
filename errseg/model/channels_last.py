"""Layers of the up-decoder as a CPU likes them: channels last in memory, products instead of small convolutions.

Elsewhere, and in half precision, the modules themselves run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def double_size(conv: nn.Module, x: Tensor) -> Tensor:
    """A 2x2 transposed convolution of stride 2, [N, C, H, W] -> [N, C', 2H, 2W]; another module is just called.

    Its windows do not overlap, so that it is one product and a rearrangement.
    """
    if not isinstance(conv, nn.ConvTranspose2d) or x.device.type != "cpu":
        return conv(x)
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    corners = weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 2 C', C]
    tokens = F.linear(x.permute(0, 2, 3, 1), corners, bias.repeat(4))
    windows = tokens.unflatten(3, (2, 2, -1)).transpose(2, 3)  # [N, H, 2, W, 2, C']
    return windows.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def one_channel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution to a single channel: [N, C, H, W] -> [N, H, W]."""
    if x.device.type != "cpu":
        return conv(x)[:, 0]
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)[..., 0]


def conv_norm_relu(x: Tensor, weight: Tensor, norm: nn.GroupNorm, added: Tensor | None = None) -> Tensor:
    """ReLU(GroupNorm(conv3x3(x) + added)), [N, C, H, W] -> [N, C', H, W].

    `added` [B, C', H, W] is the same for the N / B maps of an image. On CPUs PyTorch's GroupNorm sums channels-last
    maps term by term: ever less exact the larger they are.
    """
    if fusable(x, weight):
        return _ConvNormReLU.apply(x, weight, added, norm.weight, norm.bias, norm.num_groups, norm.eps)
    y = F.conv2d(x, weight, padding=1)
    if added is not None:
        y = (y.unflatten(0, (added.shape[0], -1)) + added[:, None]).flatten(0, 1)
    return F.relu(norm(y.contiguous()))


def fusable(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv_norm_relu` runs as one: on a CPU, in float32 or float64 throughout."""
    exact = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and exact and not torch.is_autocast_enabled("cpu")


class _ConvNormReLU(torch.autograd.Function):
    """The convolution is made again for the backward pass: cheaper than to keep it, and passes allocate nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        rows = _convolved(x, kernel, added)
        count = rows[0].numel() // groups
        mean = _group_sums(_sums(rows), groups) / count  # [N, C], equal within a group
        rows.sub_(mean[:, None, None])
        rstd = torch.rsqrt(_group_sums(_products(rows, rows), groups) / count + eps)
        rows.mul_((rstd * weight)[:, None, None]).add_(bias).relu_()
        y = rows.permute(0, 3, 1, 2)
        ctx.groups = groups
        ctx.save_for_backward(x, kernel, added, weight, mean, rstd, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, added, weight, mean, rstd, y = ctx.saved_tensors
        rows = _convolved(x, kernel, added).sub_(mean[:, None, None])
        count = rows[0].numel() // ctx.groups
        grad = torch.ops.aten.threshold_backward(_rows(grads[0]), _rows(y), 0)
        total = _sums(grad)  # [N, C]
        along = _products(grad, rows) * rstd  # of the gradient times the normalised map
        share = _group_sums(along * weight, ctx.groups) * rstd.square() / count
        level = _group_sums(total * weight, ctx.groups) * rstd / count
        grad.mul_((rstd * weight)[:, None, None]).addcmul_(rows, -share[:, None, None]).sub_(level[:, None, None])
        images = None
        if added is not None:
            images = grad.unflatten(0, (added.shape[0], -1)).sum(1).permute(0, 3, 1, 2)
        grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2), x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )  # fmt: skip
        return grad_x, grad_kernel, images, along.sum(0), total.sum(0), None, None


def _convolved(x: Tensor, kernel: Tensor, added: Tensor | None) -> Tensor:
    """A convolution of its own memory, rows [N, H, W, C]."""
    rows = _rows(F.conv2d(x.contiguous(memory_format=torch.channels_last), kernel, padding=1))
    if added is not None:
        rows.unflatten(0, (added.shape[0], -1)).add_(_rows(added)[:, None])
    return rows


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _sums(rows: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C], pairwise within PyTorch."""
    return rows.flatten(1, 2).sum(1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a b over the pixels, [N, C]: diagonals of small matrix products, row by row for the sake of rounding."""
    products = torch.matmul(a.transpose(2, 3), b)  # [N, H, C, C]
    return products.diagonal(dim1=2, dim2=3).sum(1)


def _group_sums(values: Tensor, groups: int) -> Tensor:
    """[N, C] -> [N, C] with each value replaced by the sum of its group."""
    grouped = values.unflatten(1, (groups, -1))
    return grouped.sum(2, keepdim=True).expand_as(grouped).flatten(1)
