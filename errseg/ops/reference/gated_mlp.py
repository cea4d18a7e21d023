"""LayerNorm folded into the first two of three linears."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from errseg.ops.reference.tokens import normalized


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> Tensor:
    """[..., C] -> [..., C]; see :func:`errseg.ops.gated_mlp`."""
    z = normalized(x, eps)
    hidden = F.relu6(F.linear(z, gate_weight, gate_bias)) * F.linear(z, value_weight, value_bias)
    return F.linear(hidden, out_weight, out_bias)
