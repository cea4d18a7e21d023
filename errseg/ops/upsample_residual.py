"""What brings the class block back to full resolution: bilinear upsampling and the residual, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from errseg.ops import native, reference, triton_backend
from errseg.ops.checks import describe, expect, expect_floating, same_dtype
from errseg.ops.contract import Op


def _fake(x: Tensor, residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


OP = Op(
    "upsample_residual",
    "(Tensor x, Tensor residual) -> Tensor",
    reference=reference.upsample_residual,
    fake=_fake,
    differentiable=("x", "residual"),
    added=("residual",),
)


def _triton_can_run(x: Tensor, residual: Tensor) -> str | None:
    for maps in (x, residual):
        if maps.shape[2:].numel() >= 2**31:  # offsets within a map are 32 bits wide
            return f"maps of less than 2**31 numbers, got {describe(maps)}"
    return same_dtype(x, residual) or triton_backend.sides_fit(*x.shape[2:4], *residual.shape[2:4])


_LINEAR: dict[str, Any] = {"shape_only": ("x", "residual")}  # the gradient needs no values
OP.register("cpu", native.cpu_backend("upsample_residual", trains=True, can_run=same_dtype, **_LINEAR))
OP.register("triton", triton_backend.backend("upsample_residual", can_run=_triton_can_run, **_LINEAR))


def upsample_residual(x: Tensor, residual: Tensor, *, backend: str | None = None) -> Tensor:
    """``residual`` plus ``x`` brought to its size by bilinear interpolation with aligned corners.

    Args:
        x: [B, K, h, w, C].
        residual: [B, K, H, W, C].
        backend: strict choice of a backend.

    Returns:
        [B, K, H, W, C] in the dtype of ``residual``.

    Raises:
        ValueError: on wrong shapes.

    Source: paper, RRCA: class-level sequence reduction.
    """
    expect_floating(x, 5, "x [B, K, h, w, C] floating")
    batch, num_classes, height, width, channels = x.shape
    like = residual.shape
    good = len(like) == 5 and tuple(like[:2]) == (batch, num_classes) and like[4] == channels
    expect(good and residual.is_floating_point(), f"residual [{batch}, {num_classes}, H, W, {channels}]", residual)
    expect(min(height, width) > 0 or not residual.numel(), "x of at least one pixel", x)
    return OP(x, residual, backend=backend)
