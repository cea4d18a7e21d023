"""The gated MLP of both attention blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from errseg.ops import native, reference, triton_backend
from errseg.ops.checks import expect
from errseg.ops.contract import Op
from errseg.ops.precision import at_least_float32, without_autocast

LAYER_NORM_EPS = 1e-5


class FoldedGatedMLP(NamedTuple):
    """The three linears with the LayerNorm's affine part inside the first two."""

    gate_weight: Tensor  # [M, C]
    gate_bias: Tensor  # [M]
    value_weight: Tensor  # [M, C]
    value_bias: Tensor  # [M]
    out_weight: Tensor  # [C, M]
    out_bias: Tensor  # [C]


@dataclass(frozen=True)
class GatedMLPParams:
    """Published tensors: LayerNorm (norm2), fc1 (the ReLU6 branch), fc2, fc3."""

    norm_weight: Tensor  # [C]
    norm_bias: Tensor  # [C]
    fc1_weight: Tensor  # [M, C]
    fc1_bias: Tensor  # [M]
    fc2_weight: Tensor  # [M, C]
    fc2_bias: Tensor  # [M]
    fc3_weight: Tensor  # [C, M]
    fc3_bias: Tensor  # [C]

    @without_autocast
    def fold(self) -> FoldedGatedMLP:
        """Move the LayerNorm's scale and shift into fc1 and fc2."""
        gamma, beta = at_least_float32(self.norm_weight), at_least_float32(self.norm_bias)
        fc1, fc2 = at_least_float32(self.fc1_weight), at_least_float32(self.fc2_weight)
        return FoldedGatedMLP(
            fc1 * gamma,
            self.fc1_bias + fc1 @ beta,
            fc2 * gamma,
            self.fc2_bias + fc2 @ beta,
            self.fc3_weight,
            self.fc3_bias,
        )


def _fake(x: Tensor, *weights_and_eps: object) -> Tensor:
    return x.new_empty(x.shape)


OP = Op(
    "gated_mlp",
    "(Tensor x, Tensor gate_weight, Tensor gate_bias, Tensor value_weight, Tensor value_bias, Tensor out_weight, "
    "Tensor out_bias, float eps) -> Tensor",
    reference=reference.gated_mlp,
    fake=_fake,
    differentiable=("x", *FoldedGatedMLP._fields),
)


def _triton_can_run(x: Tensor, *rest: object) -> str | None:
    return triton_backend.heads_fit(x.shape[-1])


OP.register("cpu", native.cpu_backend("gated_mlp", trains=True))
OP.register("triton", triton_backend.backend("gated_mlp", can_run=_triton_can_run))


def gated_mlp(
    x: Tensor,
    params: GatedMLPParams | FoldedGatedMLP,
    *,
    eps: float = LAYER_NORM_EPS,
    backend: str | None = None,
) -> Tensor:
    """``fc3(ReLU6(fc1(z)) * fc2(z))`` with ``z = LayerNorm(x)``.

    Args:
        x: [..., C] tokens.
        params: published tensors, or their ``fold()``.
        eps: of the LayerNorm.
        backend: strict choice of a backend.

    Returns:
        the shape and dtype of ``x``; the residual is not added.

    Raises:
        ValueError: on wrong shapes.

    Source: paper, RRCA: feed-forward part.
    """
    folded = params.fold() if isinstance(params, GatedMLPParams) else params
    channels = folded.gate_weight.shape[1]
    expect(x.ndim >= 2 and x.shape[-1] == channels and x.is_floating_point(), f"x [..., {channels}] floating", x)
    return OP(x, *(t.to(x.dtype) for t in folded), eps, backend=backend)
