"""The gated MLP of both attention blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, norm_and_layers, sample_inputs, with_weights
from errseg.testing.published_decoder import GatedMLP


class _NormAndMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = GatedMLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp.gate(self.norm2(x))


def _prepare(inputs: Inputs) -> Inputs:
    x, params = inputs
    hidden, width = params.fc1_weight.shape
    module = with_weights(_NormAndMLP(width, hidden), norm_and_layers(params, "norm2", "mlp."))
    return module, x.flatten(0, 1).flatten(1, 2)  # published tokens: [B K, H W, C]


def _published(module: Any, x: Tensor) -> Tensor:
    return module(x)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    width, hidden = case.decoder.width, case.decoder.mlp_dim
    tokens = case.batch * case.kept * case.os16**2
    weights = numel((3, width, hidden), (2, hidden), (3, width))
    reads = itemsize * (tokens * width + weights)
    return product_counts(passing, 6 * tokens * width * hidden, reads, itemsize * tokens * width)


TARGET = Target(
    name="gated_mlp",
    ops=("gated_mlp",),
    cases=(EVAL_B,),
    quick=SMALL,
    sweeps=OVER_CLASSES,
    inputs=sample_inputs("gated_mlp"),
    implementations={
        "errseg": lambda case: Implementation(ops.gated_mlp),
        "published": lambda case: Implementation(
            _published,
            _prepare,
            lambda tokens: tokens.unflatten(1, (case.os16, -1)).unflatten(0, (case.batch, -1)),
        ),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
    kinked=True,
)
