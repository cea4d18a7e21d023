"""A model arranged as the published one is, over the in-house yardstick: same attributes, arguments and results."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errseg import DenseFeatures
from errseg.model.config import DecoderConfig
from errseg.testing import PublishedDecoder, published_dense, published_loss, random_decoder_weights
from errseg.testing.inputs import SMALL_DECODER

CONFIG = replace(SMALL_DECODER, text_dim=24, guidance_channels=(8, 8, 8, 8))
WORDS = ["a", "cat, kitten", "sofa", "traffic light", "swimming pool", "wall", "tree", "sky", "person"]
LENGTH = 20  # tokens of a prompt, filled with zeros; END closes one
END = 63


def yardstick(dtype: torch.dtype = torch.float64, config: DecoderConfig = SMALL_DECODER) -> PublishedDecoder:
    """A PublishedDecoder with random weights, in training mode with drop path off."""
    return PublishedDecoder.from_published(random_decoder_weights(config, seed=1, dtype=dtype), drop_path_rate=0.0)


class Decoder(PublishedDecoder):
    """The yardstick with the arguments of the published decoder, and its dense float32 answer."""

    K = 4

    def forward(self, img_feats: Any, text_feats: Any, img_guidances: Any, gt_classes: Any) -> Any:  # type: ignore[override]
        answers = []
        for i in range(len(text_feats)):
            features = DenseFeatures(*(t[i : i + 1] for t in (*img_guidances[::-1], *img_feats)))
            required = torch.zeros(1, text_feats.shape[1], dtype=torch.bool)
            if self.training:
                required[0, gt_classes[i]] = True
            logits, ids = super().forward(features, text_feats[i, :, 0], num_selected=self.K, required=required)
            answers.append(published_dense(logits, ids, text_feats.shape[1]))
        dense = torch.cat(answers)
        return dense if keep_double else dense.float()


keep_double = False  # for tests that compare to the last digits


class TextTransformer(nn.Module):
    """One causal layer over [L, T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)

    def get_cast_dtype(self) -> torch.dtype:
        return self.attn.in_proj_weight.dtype

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        return x + self.attn(x, x, x, attn_mask=attn_mask, need_weights=False)[0]


class Towers(nn.Module):
    """What the head and the model ask of CLIP: dense maps of a picture, embeddings of tokens."""

    def __init__(self, dim: int, width: int = 16) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({f"os{4 << i}": nn.Conv2d(3, 8, 4 << i, 4 << i) for i in range(4)})
        self.project = nn.Conv2d(8, dim, 1)
        self.token_embedding = nn.Embedding(END + 1, width)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, width))
        self.transformer = TextTransformer(width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, dim))
        self.lengths: list[int] = []

    def encode_image(self, image: Tensor, dense: bool = True) -> dict[str, Tensor]:
        maps = {name: layer(image) for name, layer in self.visual.items()}
        return maps | {"os16_dense": self.project(maps["os16"]), "clip_vis_dense": self.project(maps["os32"])}

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=x.dtype).triu(1)
        x = self.ln_final(self.transformer(x.transpose(0, 1), attn_mask=mask).transpose(0, 1))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


def tokenize(texts: Sequence[str]) -> Tensor:
    """A token a word, the end after the last."""
    rows = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = [1 + zlib.crc32(word.encode()) % (END - 1) for word in text.split()]
        row[: len(ids) + 1] = torch.tensor([*ids, END])
    return rows


class Head(nn.Module):
    """The published head's arrangement; it knows one vocabulary for training and one for evaluation."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.class_texts, self.test_class_texts = WORDS, [*WORDS[3:], "door", "river"]
        self.clip_model = Towers(CONFIG.text_dim)
        self.tokenizer = tokenize
        self.prompt_templates = ["A photo of a {} in the scene"]
        self.decoder = decoder

    def get_text_embeds(self, classnames: Sequence[str]) -> Tensor:
        prompts = [self.prompt_templates[0].format(name.split(", ")[0]) for name in classnames]
        return F.normalize(self.clip_model.encode_text(self.tokenizer(prompts)), dim=-1)[:, None]

    def forward(self, img_features: Any, proj_features: Any, img_gudiances: Any, gt_classes: Any) -> Any:
        text = self.get_text_embeds(self.class_texts if self.training else self.test_class_texts)
        text = text.repeat(len(img_features), 1, 1, 1)
        return self.decoder([*proj_features, img_features], text, img_gudiances[::-1], gt_classes)


class Model(nn.Module):
    """The published meta-architecture's arrangement."""

    def __init__(self, head: nn.Module, divisor: int = -1) -> None:
        super().__init__()
        self.sem_seg_head = head
        self.register_buffer("clip_pixel_mean", torch.full((3, 1, 1), 120.0), False)
        self.register_buffer("clip_pixel_std", torch.full((3, 1, 1), 58.0), False)
        self.clip_resolution, self.size_divisibility, self.ignore_value = (96, 64), divisor, 255

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        pictures = torch.stack([(x["image"] - self.clip_pixel_mean) / self.clip_pixel_std for x in batched_inputs])
        if self.training and self.size_divisibility > 1:
            short = [-side % self.size_divisibility for side in pictures.shape[2:]]
            pictures = F.pad(pictures, (0, short[1], 0, short[0]))
        maps = self.sem_seg_head.clip_model.encode_image(F.interpolate(pictures, self.clip_resolution, mode="bilinear"))
        taps = [maps[f"os{4 << i}"] for i in range(4)]
        truth = None
        if self.training:
            target = torch.stack([x["sem_seg"] for x in batched_inputs])
            truth = [t.unique()[t.unique() != self.ignore_value] for t in target]
        dense = self.sem_seg_head(maps["clip_vis_dense"], [maps["os16_dense"]], taps, truth)
        if self.training:
            return {"loss_sem_seg_0": published_loss(dense, target, self.ignore_value)}
        size = batched_inputs[0]["height"], batched_inputs[0]["width"]
        return [{"sem_seg": F.interpolate(dense[:1].sigmoid(), size, mode="bilinear")[0]}]


def model(dtype: torch.dtype = torch.float64, divisor: int = -1) -> Model:
    """The whole of it, in training mode with drop path off."""
    torch.manual_seed(3)
    decoder = Decoder.from_published(random_decoder_weights(CONFIG, seed=1), drop_path_rate=0.0)
    return Model(Head(decoder), divisor).to(dtype)
