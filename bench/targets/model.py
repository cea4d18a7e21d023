"""Image and word embeddings to labels: towers with random weights, decoder, post-processing.

The towers are the same module for every provider; what differs is the decoder and what follows it. Words are
embedded beforehand, as a vocabulary is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from errseg.bench.cases import Case, Counts, vary
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import B_AXIS, T_AXIS
from errseg.model.config import CONFIGS
from errseg.model.errseg import ERRSeg, create_model
from errseg.testing.inputs import random_text_embeddings
from errseg.testing.published_decoder import published_dense, published_labels

B = Case()
L = Case(model="l", size=768)
TINY = Case(model="tiny", classes=5, words=11, size=96)


def _inputs(case: Case, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (case.batch, 3, case.size, case.size), dtype=torch.uint8, generator=generator)
    dim = CONFIGS[f"errseg-{case.model}"].decoder.text_dim
    return image, random_text_embeddings(case.words, dim, seed=0), case.kept, None


def _towers(case: Case) -> ERRSeg:
    """A model with the same random towers whenever it is made; weights that bfloat16 holds exactly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = create_model(f"errseg-{case.model}", weights="random")
    for parameter in model.clip.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


class _Model(nn.Module):
    """Towers and one of the two decoders."""

    def __init__(self, case: Case, decoder: nn.Module, published: bool) -> None:
        super().__init__()
        model = _towers(case)
        model.decoder = decoder  # type: ignore[assignment]
        model.clip.requires_grad_(False)
        del model.clip.transformer  # words are embedded beforehand
        self.model, self.published = model, published

    def forward(self, image: Tensor, text: Tensor, num_selected: int, class_ids: Tensor | None) -> tuple[Tensor, ...]:
        """(logits, class_ids, labels)."""
        size = image.shape[-2], image.shape[-1]
        logits, class_ids = self.model(image, text, num_selected=num_selected, class_ids=class_ids)
        if self.published:
            labels = published_labels(published_dense(logits, class_ids, len(text)), size)
        else:
            labels = networks.labels_of(logits, class_ids, size)
        return logits, class_ids, labels


def _run(module: _Model, *arguments: Any) -> Any:
    return module(*arguments)


def _errseg(case: Case) -> Implementation:
    return Implementation(_run, module=_Model(case, networks.decoder(case), published=False))


def _published(case: Case) -> Implementation:
    return Implementation(_run, module=_Model(case, networks.published_decoder(case), published=True))


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    results = case.batch * case.size**2
    return networks.network_counts(case, itemsize, passing, _inputs, _errseg, networks.first, results)


TARGET = Target(
    name="model",
    ops=(*networks.OPS, "upsample_argmax"),
    cases=(B, L),
    quick=TINY,
    sweeps=vary(B, words=T_AXIS, batch=B_AXIS),
    inputs=_inputs,
    implementations={"errseg": _errseg, "published": _published},
    counts=_counts,
    differentiate=networks.first,
    check=networks.check_labels,
    mixed=True,
)
