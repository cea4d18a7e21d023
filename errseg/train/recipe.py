"""The published optimisation: what trains, in which groups, at which rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from errseg.model.clip import DenseCLIP
from errseg.model.errseg import ERRSeg

BETAS, EPS = (0.9, 0.999), 1e-8
WARMUP_FACTOR = 1e-3


def is_trainable(name: str) -> bool:
    """Whether a parameter of the towers trains, by its open_clip name."""
    if name.startswith("visual"):
        return "gamma" in name or (("mlp" in name or "conv_dw" in name) and "weight" in name)
    return "transformer" in name and ("in_proj_weight" in name or "c_fc.weight" in name)


def freeze(clip: DenseCLIP) -> None:
    """Leave gradients to the published choice of the towers' parameters alone."""
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(is_trainable(name))


def parameter_groups(model: ERRSeg, *, lr: float, clip_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Three groups: towers (lr times `clip_lr`), decoder, and the decoder's norms, which do not decay."""
    norms = {
        id(parameter)
        for module in model.decoder.modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
        for parameter in module.parameters()
    }
    towers = [p for p in model.clip.parameters() if p.requires_grad]
    decoder = [p for p in model.decoder.parameters() if id(p) not in norms]
    still = [p for p in model.decoder.parameters() if id(p) in norms]
    return [
        {"name": "towers", "params": towers, "lr": lr * clip_lr, "weight_decay": weight_decay},
        {"name": "decoder", "params": decoder, "lr": lr, "weight_decay": weight_decay},
        {"name": "norms", "params": still, "lr": lr, "weight_decay": 0.0},
    ]


def make_adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW in one kernel for each group and device."""
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """Rate at a step, as a share of the peak: linear from 0.001 to the cosine's value where the warm-up ends."""

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

    def factor(step: int) -> float:
        if step >= warmup:
            return cosine(step)
        return WARMUP_FACTOR + (cosine(warmup) - WARMUP_FACTOR) * step / warmup

    return factor
