"""The depthwise 7x7 convolution on token-major maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from errseg.ops import native, reference
from errseg.ops.checks import expect, expect_floating, expect_shape, same_dtype
from errseg.ops.contract import Op


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, drop_path: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


OP = Op(
    "depthwise_conv",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? drop_path) -> Tensor",
    reference=reference.depthwise_conv,
    fake=_fake,
    differentiable=("x", "weight", "bias", "residual"),
    added=("residual",),
)


def _can_run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: object) -> str | None:
    return None if residual is None else same_dtype(x, residual)


_TRAINING: dict[str, Any] = {"trains": True, "shape_only": ("bias", "residual"), "can_run": _can_run}
OP.register("cpu", native.cpu_backend("depthwise_conv", **_TRAINING))
OP.register("cuda", native.cuda_backend("depthwise_conv", **_TRAINING))


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    drop_path: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``residual + drop_path * (conv(x) + bias)``, one filter per channel, zero-padded to the same size.

    Args:
        x: [B, K, H, W, C].
        weight: [C, 1, k, k], k odd (published: 7).
        bias: [C].
        residual: the shape of ``x``.
        drop_path: [B, K], 0 for a dropped branch, else one over the keep probability.
        backend: strict choice of a backend.

    Returns:
        [B, K, H, W, C] in the dtype of ``x``.

    Raises:
        ValueError: on wrong shapes.

    Source: paper, RRCA: convolution of the spatial feed-forward part.
    """
    expect_floating(x, 5, "x [B, K, H, W, C] floating")
    channels, size = x.shape[-1], weight.shape[-1]
    good = tuple(weight.shape) == (channels, 1, size, size) and size % 2 == 1
    expect(good, f"weight [{channels}, 1, k, k] with k odd", weight)
    expect_shape(bias, (channels,), "bias")
    expect_shape(residual, tuple(x.shape), "residual")
    expect_shape(drop_path, tuple(x.shape[:2]), "drop_path")
    return OP(x, weight, bias, residual, drop_path, backend=backend)
