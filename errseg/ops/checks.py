"""Argument checks shared by the ops: what was expected, and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def describe(value: object) -> str:
    """A tensor as ``[2, 48] float32``, anything else as its ``repr``."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value)


def expect(condition: bool, expected: str, got: object) -> None:
    """Raise ``ValueError("expected ..., got ...")`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"expected {expected}, got {describe(got)}")


def expect_floating(tensor: Tensor, dim: int, expected: str) -> None:
    """A floating-point tensor with ``dim`` dimensions."""
    expect(tensor.ndim == dim and tensor.is_floating_point(), expected, tensor)


def expect_shape(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """An optional tensor of exactly this shape."""
    if tensor is not None:
        expect(tuple(tensor.shape) == shape, f"{name} {list(shape)}", tensor)


def expect_class_ids(class_ids: Tensor, batch: int, num_classes: int | None = None) -> None:
    """Class ids [B, K] in int64."""
    size = "K" if num_classes is None else num_classes
    good = class_ids.ndim == 2 and class_ids.shape[0] == batch and class_ids.dtype == torch.int64
    expect(
        good and (num_classes is None or class_ids.shape[1] == num_classes),
        f"class_ids [{batch}, {size}] int64",
        class_ids,
    )


def same_dtype(x: Tensor, residual: Tensor) -> str | None:
    """Why a backend that adds in one dtype cannot take this residual."""
    if residual.dtype == x.dtype:
        return None
    return f"needs x and residual of one dtype, got {describe(x)} and {describe(residual)}"
