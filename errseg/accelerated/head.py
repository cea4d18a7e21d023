"""The published head: words to embeddings with tokens cut to the longest prompt, then the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from errseg.accelerated.fused import Fused
from errseg.model.decoder import DecoderOutput
from errseg.model.tokenizer import prompt_length

SYNONYMS = ", "  # between the names of one class, of which the first counts


@dataclass
class TextState:
    """Tokens and embeddings of vocabularies seen, the latter with what they were made from."""

    tokens: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    embeddings: dict[tuple[str, ...], tuple[object, Tensor]] = field(default_factory=dict)


class FusedHead(Fused):
    """In front of the published `ERRSEGHead`."""

    fused_state: TextState
    clip_model: Any
    decoder: nn.Module
    tokenizer: Any
    class_texts: list[str]
    test_class_texts: list[str]
    prompt_templates: list[str]

    def forward(
        self,
        img_features: Tensor,
        proj_features: list[Tensor],
        img_gudiances: Sequence[Tensor],
        gt_classes: Sequence[Tensor] | Tensor | None,
        *,
        dense: bool = True,
    ) -> Tensor | DecoderOutput:
        """Logits of the vocabulary in force, see :meth:`FusedDecoder.forward`.

        `img_features` [B, D, H/2, W/2] at 1/32, `proj_features` one map [B, D, H, W] at 1/16, taps from 1/4 to 1/32.
        """
        text = self.get_text_embeds(self.words())[None].expand(len(img_features), -1, -1, -1)
        features = [*proj_features, img_features]
        if dense:
            return self.decoder(features, text, img_gudiances[::-1], gt_classes)
        return self.decoder(features, text, img_gudiances[::-1], gt_classes, dense=False)

    def words(self) -> list[str]:
        """The vocabulary in force: that of training or that of evaluation."""
        return self.class_texts if self.training else self.test_class_texts

    def train(self, mode: bool = True) -> FusedHead:
        """As every module's; embeddings kept for evaluation are forgotten, since training changes the weights."""
        self.fused_state.embeddings.clear()
        return super().train(mode)

    @torch.compiler.disable
    def get_text_embeds(self, classnames: Sequence[str]) -> Tensor:
        """Embeddings [T, 1, D] of length 1; kept in evaluation without gradients, until words or weights change."""
        words = tuple(classnames)
        if self.training or torch.is_grad_enabled():
            return self._embed(words)
        weights, known = _fingerprint(self.clip_model), self.fused_state.embeddings.get(words)
        if known is None or known[0] != weights:
            known = (weights, self._embed(words))
            self.fused_state.embeddings[words] = known
        return known[1]

    def _embed(self, words: tuple[str, ...]) -> Tensor:
        tokens = self.fused_state.tokens.get(words)
        if tokens is None:
            prompts = [self.prompt_templates[0].format(word.split(SYNONYMS)[0]) for word in words]
            tokens = self.tokenizer(prompts)
            tokens = tokens[:, : prompt_length(tokens)]
            self.fused_state.tokens[words] = tokens
        if tokens.device != (device := self.clip_model.positional_embedding.device):
            tokens = self.fused_state.tokens[words] = tokens.to(device)
        embeddings = _encode(self.clip_model, tokens)
        return (embeddings / embeddings.norm(dim=-1, keepdim=True))[:, None]


def _encode(clip: Any, tokens: Tensor) -> Tensor:
    """Embeddings [T, D] of prompts [T, L]: the text tower is causal, so tokens behind the longest prompt are idle."""
    length = tokens.shape[1]
    dtype = clip.transformer.get_cast_dtype()
    x = clip.token_embedding(tokens).to(dtype) + clip.positional_embedding[:length].to(dtype)
    causal = x.new_full((length, length), float("-inf")).triu_(1)
    x = clip.transformer(x.transpose(0, 1), attn_mask=causal).transpose(0, 1)  # the published tower is [L, T, width]
    ends = tokens.argmax(dim=-1)  # the end token has the largest id
    return clip.ln_final(x)[torch.arange(len(tokens), device=x.device), ends] @ clip.text_projection


def _fingerprint(clip: nn.Module) -> tuple[object, ...]:
    """Changes with each in-place update, replacement or conversion of a parameter of the text tower."""
    text = [p for name, p in clip.named_parameters() if not name.startswith("visual.")]
    return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in text)
