"""Word prompts through the text tower, as a training step does it: cut to the longest prompt, or 77 tokens long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from errseg.bench.cases import Case, Counts
from errseg.bench.registry import Bar, Implementation, Inputs, Target
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import SMALL, TRAIN
from errseg.model.clip import DenseCLIP
from errseg.model.config import CONFIGS
from errseg.model.errseg import create_model

LONGEST = 12  # tokens of the longest prompt: "A photo of a ... in the scene" around two words or three


def _name(case: Case) -> str:
    return "errseg-tiny" if case.model == "small" else f"errseg-{case.model}"


def _tower(case: Case) -> DenseCLIP:
    """The text tower with the same random weights whenever it is made; the image tower is dropped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        clip = create_model(_name(case), weights="random").clip
    del clip.visual
    for parameter in clip.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return clip


def _inputs(case: Case, seed: int) -> Inputs:
    """Token rows [T, 77] of prompts of 9 to 12 tokens, start and end included."""
    text = CONFIGS[_name(case)].clip.text
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, text.vocab_size - 2, (case.words, text.context_length), generator=generator)
    lengths = torch.randint(9, LONGEST + 1, (case.words,), generator=generator)
    lengths[0] = LONGEST
    position = torch.arange(text.context_length)
    tokens = torch.where(position < lengths[:, None] - 1, tokens, 0)
    tokens.scatter_(1, lengths[:, None] - 1, text.vocab_size - 1)  # the end token has the largest id
    return (tokens,)


def _cut(clip: Any, tokens: Tensor) -> Tensor:
    embeddings: Tensor = clip.encode_text(tokens, length=LONGEST)
    return embeddings


def _whole(clip: Any, tokens: Tensor) -> Tensor:
    embeddings: Tensor = clip.encode_text(tokens, length=tokens.shape[1])
    return embeddings


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    results = case.words * CONFIGS[_name(case)].clip.embed_dim
    return networks.network_counts(case, itemsize, passing, _inputs, _errseg, lambda out: out, results)


def _errseg(case: Case) -> Implementation:
    return Implementation(_cut, module=_tower(case), weights=_weights)


def _published(case: Case) -> Implementation:
    return Implementation(_whole, module=_tower(case), weights=_weights)


TARGET = Target(
    name="prompts",
    ops=(),
    cases=(TRAIN,),
    quick=SMALL,
    inputs=_inputs,
    implementations={"errseg": _errseg, "published": _published},
    counts=_counts,
    passes=("forward", "both"),
    differentiable=True,
    bars=(Bar(TRAIN, "both", "reference", "published", times=5.0),),
)
