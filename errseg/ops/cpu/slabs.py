"""What the slab-wise backends share: slices, LayerNorm, sums over slabs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB_TOKENS = 1024  # a few hundred hidden units of so many tokens fit a second-level cache


def slabs(num_tokens: int, size: int = SLAB_TOKENS) -> Iterator[slice]:
    """Slices that cover ``num_tokens``."""
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; in float32 by oneDNN, on many processors the quicker BLAS."""
    if x.dtype == torch.float32 and x.numel() and torch.backends.mkldnn.is_available():
        product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        assert isinstance(product, Tensor)
        return product
    return F.linear(x, weight, bias)


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of rows without its affine part, then means and inverse deviations."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)


def normalize_backward(grad: Tensor, x: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    """The gradient of rows from that of the normalised rows."""
    wanted = [True, False, False]
    rows = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, inverse_deviation, None, None, wanted
    )[0]
    assert isinstance(rows, Tensor)
    return rows


class Total:
    """A weight's gradient, added up over slabs in float32 or better."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.sum = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add ``left.T @ right``, both [tokens, ...]."""
        self.sum += linear(left.T.contiguous(), right.T)

    def add_rows(self, rows: Tensor) -> None:
        """Add the sum over all rows."""
        self.sum += rows.sum(0, dtype=self.sum.dtype)

    def add_to(self, image: int, maps: Tensor) -> None:
        """Add the sum over the classes of one image."""
        self.sum[image] += maps.sum(0, dtype=self.sum.dtype)

    def result(self) -> Tensor:
        """In the weight's dtype."""
        return self.sum.to(self.dtype)
