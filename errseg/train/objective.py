"""The network in training, and its loss: over the K selected classes, or in the published order of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errseg.errors import ErrSegError
from errseg.model.clip import DenseCLIP
from errseg.model.decoder import Decoder, published_name
from errseg.model.errseg import ERRSeg, create_model
from errseg.model.tokenizer import prompt_length
from errseg.ops import upsample_bce
from errseg.settings import check_prompt
from errseg.testing.published_decoder import PublishedDecoder, published_dense, published_loss
from errseg.train.augment import IGNORED
from errseg.train.settings import TrainConfig


class Objective(nn.Module):
    """Images and targets to the published loss (mean over B H W T), the text tower included.

    `fused` computes with this project's operators; otherwise the decoder and the loss run as published, over all T
    words, on the very same parameters.
    """

    def __init__(
        self,
        model: ERRSeg,
        words: Sequence[str],
        *,
        num_selected: int,
        fused: bool = True,
        exclude_ignored: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.num_selected, self.exclude_ignored = model, num_selected, exclude_ignored
        tokens = model.clip.tokenizer.tokenize([model.config.prompt.replace("{}", word) for word in words])
        self.length = prompt_length(tokens)  # the tower is causal: what follows the longest prompt cannot matter
        self.register_buffer("tokens", tokens[:, : self.length].contiguous(), persistent=False)
        # In a tuple, so that its parameters are not listed a second time.
        self.published = () if fused else (published_view(model.decoder),)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of images [B, 3, S, S] (0..255) and targets [B, S, S] int32, -1 ignored."""
        text = self.model.clip.encode_text(self.get_buffer("tokens"), length=self.length)  # [T, D]
        required = present_classes(targets, len(text))
        features = self.model.clip(self.model.normalize(images))
        decoder = self.published[0] if self.published else self.model.decoder
        output = decoder(features, text, num_selected=self.num_selected, required=required)
        if self.published:
            dense = published_dense(output.logits, output.class_ids, len(text))
            return published_loss(dense, targets, ignore_index=IGNORED)
        return upsample_bce(
            output.logits,
            output.class_ids,
            targets,
            vocabulary_size=len(text),
            ignore_index=IGNORED,
            exclude_ignored=self.exclude_ignored,
        )


def build_model(config: TrainConfig) -> ERRSeg:
    """The network of a configuration, on the CPU."""
    model, settings = config.model, config.train
    overrides = {
        "size": model.size,
        "num_selected": model.num_selected,
        "prompt": None if model.prompt is None else check_prompt(model.prompt),
        "drop_path": settings.drop_path,
        "decoder_drop_path": settings.decoder_drop_path,
    }
    names = {"decoder_drop_path": "drop_path_rate"}
    given = {names.get(name, name): value for name, value in overrides.items() if value is not None}
    return create_model(model.name, model.weights, **given)


def present_classes(targets: Tensor, num_classes: int) -> Tensor:
    """[B, T] bool: which classes each of the targets [B, H, W] (-1 ignored) shows; without waiting for the device."""
    flat = targets.flatten(1).long()
    flat = torch.where(flat < 0, num_classes, flat)
    present = torch.zeros(len(flat), num_classes + 1, dtype=torch.bool, device=flat.device)
    return present.scatter_(1, flat, True)[:, :num_classes]


def published_view(decoder: Decoder) -> PublishedDecoder:
    """The published order of operations on the decoder's own parameters: training one trains the other."""
    with torch.device("meta"):
        view = PublishedDecoder(decoder.config)
    view.load_state_dict({published_name(n): p for n, p in decoder.named_parameters()}, strict=True, assign=True)
    return view.train()


def checkpoint_towers(clip: DenseCLIP) -> None:
    """Keep only the inputs of every block of both towers for the backward pass, and compute the rest again there."""
    for stage in clip.visual.trunk.stages:
        for block in stage.blocks:
            block.forward = partial(_recomputed, block.forward)
    clip.transformer.grad_checkpointing = True


def _recomputed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def check_words(words: Sequence[str], class_of_word: Sequence[int]) -> None:
    """Raise ErrSegError for a set in which several words stand for one class."""
    if tuple(class_of_word) != tuple(range(len(words))):
        raise ErrSegError("data: this set counts several words as one class: it is for evaluation only")
