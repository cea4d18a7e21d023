"""The gated MLP in slabs of tokens, whose hidden units stay in the second-level cache.

Fresh memory costs a CPU more than the arithmetic on it; slabs of one size get the same few blocks again and again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from errseg.ops.cpu.slabs import Total, linear, normalize, normalize_backward, slabs

LIMITS = (0.0, 6.0)  # of ReLU6


def forward(
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
    tokens = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(tokens)
    for slab in slabs(len(tokens)):
        z, *_ = normalize(tokens[slab], eps)
        gate = linear(z, gate_weight, gate_bias).clamp_(*LIMITS)
        out[slab] = linear(gate.mul_(linear(z, value_weight, value_bias)), out_weight, out_bias)
    return out.view(x.shape)


def backward(
    grad: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of tokens and weights; the hidden units are computed again."""
    tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    weights = gate_weight, gate_bias, value_weight, value_bias, out_weight, out_bias
    d_tokens = torch.empty_like(tokens)
    d_weights = [Total(weight) for weight in weights]
    d_gate_weight, d_gate_bias, d_value_weight, d_value_bias, d_out_weight, d_out_bias = d_weights
    for slab in slabs(len(tokens)):
        g = grads[slab]
        z, *statistics = normalize(tokens[slab], eps)
        gate, value = linear(z, gate_weight, gate_bias), linear(z, value_weight, value_bias)
        d_units = linear(g, out_weight.T)
        d_gate = torch.ops.aten.hardtanh_backward(d_units * value, gate, *LIMITS)
        d_out_weight.add_product(g, value.mul_(gate.clamp_(*LIMITS)))
        d_value = d_units.mul_(gate)
        d_out_bias.add_rows(g)
        d_gate_weight.add_product(d_gate, z)
        d_gate_bias.add_rows(d_gate)
        d_value_weight.add_product(d_value, z)
        d_value_bias.add_rows(d_value)
        dz = linear(d_gate, gate_weight.T).add_(linear(d_value, value_weight.T))
        d_tokens[slab] = normalize_backward(dz, tokens[slab], *statistics)
    return [d_tokens.view(x.shape), *(total.result() for total in d_weights)]
