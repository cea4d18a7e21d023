"""The three steps of the up-decoder, one after the other: [B, K, H, W, C] to [B, K, 4H, 4W, C'']."""

from __future__ import annotations

from torch import Tensor, nn

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets import _blocks as blocks
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, TRAIN, with_weights
from errseg.testing.inputs import random_decoder_weights, random_tensor
from errseg.testing.published_decoder import UpDecoderStep
from errseg.testing.published_ops import published_up_step

Guidance = tuple[Tensor, Tensor, Tensor]
Params = tuple[ops.UpStepParams, ops.UpStepParams, ops.UpStepParams]


def _inputs(case: Case, seed: int) -> Inputs:
    """Tokens, one guidance map per step at 1/16, 1/8 and 1/4, and the published tensors of each step."""
    config, side = case.decoder, case.os16
    x = random_tensor(case.batch, case.kept, side, side, config.width, seed=seed)
    guidance = tuple(
        random_tensor(case.batch, channels, side << j, side << j, seed=seed + 1 + j)
        for j, channels in enumerate(config.decoder_guidance)
    )
    weights = random_decoder_weights(config, seed=7)
    return x, guidance, tuple(_params(weights, f"up_decoder{j}.") for j in (1, 2, 3))


def _params(weights: dict[str, Tensor], prefix: str) -> ops.UpStepParams:
    names = "up_conv", "textual_fusion.0", "textual_fusion.1", "textual_fusion.3", "textual_fusion.4"
    tensors = (weights.get(f"{prefix}{name}.{kind}") for name in names for kind in ("weight", "bias"))
    return ops.UpStepParams(*(t for t in tensors if t is not None))  # the convolutions have no bias


def _run(x: Tensor, guidance: Guidance, params: Params) -> Tensor:
    for step_guidance, step_params in zip(guidance, params, strict=True):
        x = ops.up_step(x, step_guidance, step_params)
    return x


def _prepare(inputs: Inputs) -> Inputs:
    x, guidance, params = inputs
    return blocks.to_maps(x), guidance, tuple(_module(p) for p in params)


def _module(p: ops.UpStepParams) -> nn.Module:
    channels, guides = len(p.up_bias), p.conv1_weight.shape[1] - len(p.up_bias)
    up: nn.Module = nn.Conv2d(p.up_weight.shape[1], channels, 1)
    if p.up_weight.shape[-1] == 2:
        up = nn.ConvTranspose2d(p.up_weight.shape[0], channels, 2, stride=2)
    return with_weights(UpDecoderStep(up, channels, guides), published_up_step(p))


def _published(maps: Tensor, guidance: Guidance, modules: tuple[nn.Module, ...]) -> Tensor:
    """On channel-major maps, as the published code keeps them."""
    for module, step_guidance in zip(modules, guidance, strict=True):
        maps = module(maps, step_guidance)
    return maps


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    config, maps = case.decoder, case.batch * case.kept
    products, reads, before = 0, maps * case.os16**2 * config.width, config.width
    for j, (channels, guides) in enumerate(zip(config.decoder_dims, config.decoder_guidance, strict=True)):
        pixels = (case.os16 << j) ** 2
        own = before * channels + 9 * channels**2 if j == 0 else 4 * before * channels
        products += maps * pixels * (own + 9 * channels**2) + case.batch * pixels * 9 * (guides + 1) * channels
        up = (1 if j == 0 else 4) * before * channels
        reads += case.batch * pixels * guides + up + 9 * channels * (2 * channels + guides) + 5 * channels
        before = channels
    return product_counts(passing, 2 * products, itemsize * reads, itemsize * numel((maps, pixels, before)))


TARGET = Target(
    name="up_step",
    ops=("up_step",),
    cases=(EVAL_B, TRAIN),
    quick=SMALL,
    sweeps=tuple(case for case in OVER_CLASSES if case != TRAIN),
    inputs=_inputs,
    implementations={
        "errseg": lambda case: Implementation(_run),
        "published": lambda case: Implementation(_published, _prepare, blocks.to_tokens(case)),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
    kinked=True,
)
