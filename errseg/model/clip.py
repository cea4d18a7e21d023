"""CLIP's two towers: dense image features at two depths, and text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errseg.errors import ErrSegError
from errseg.model.config import ClipConfig
from errseg.model.tokenizer import Tokenizer, import_open_clip, prompt_length
from errseg.model.two_maps import two_maps


class DenseFeatures(NamedTuple):
    """Maps [B, C, h, w] at 1/4, 1/8, 1/16, 1/32 of the image; os4 and os8 carry no gradient.

    `os16_dense` and `os32_dense` are per-pixel CLIP embeddings [B, D, h, w], not normalised.
    """

    os4: Tensor
    os8: Tensor
    os16: Tensor
    os32: Tensor
    os16_dense: Tensor
    os32_dense: Tensor


class DenseCLIP(nn.Module):
    """open_clip's ConvNeXt CLIP with dense outputs and a second, stride-1 pass of stage 4.

    State-dict keys are open_clip's plus `visual.modify_downsample.{0,2}.{weight,bias}`, as in the published
    checkpoints. `token_ids` reduces the vocabulary to those byte-pair ids; by default the configuration says.
    Weights are random: see `errseg.create_model` for others. Nothing is downloaded.
    """

    def __init__(self, config: ClipConfig, token_ids: Sequence[int] | None = None) -> None:
        super().__init__()
        if token_ids is not None:
            text = replace(config.text, token_ids=tuple(token_ids), vocab_size=len(token_ids))
            config = replace(config, text=text)
        self.config = config
        clip = _build_open_clip(config)
        self.visual = clip.visual
        self.transformer = clip.transformer
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale
        self.logit_bias = None  # open_clip's loader looks for it
        _use_onednn(self.visual.trunk)
        self.visual.modify_downsample = _stride_one_downsample(self.visual.trunk.stages[3].downsample)
        self.tokenizer = Tokenizer(config.text.context_length, config.text.token_ids)

    def forward(self, image: Tensor) -> DenseFeatures:
        """Dense features of normalised images [B, 3, H, W], H and W multiples of 32, ValueError otherwise."""
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % 32 or image.shape[3] % 32:
            raise ValueError(f"expected image [B, 3, H, W] with H and W multiples of 32, got {list(image.shape)}")
        trunk = self.visual.trunk
        os4 = trunk.stages[0](trunk.stem(image))
        os8 = trunk.stages[1](os4)
        os16 = trunk.stages[2](os8)
        grown = self.visual.modify_downsample(os16)
        resized = F.interpolate(grown, size=os16.shape[2:], mode="bilinear", align_corners=False)
        dense, os32 = self._last_stage(resized, os16)
        return DenseFeatures(os4.detach(), os8.detach(), os16, os32, self.project(dense), self.project(os32))

    def _last_stage(self, resized: Tensor, os16: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 4 twice: its blocks on a map at 1/16, and the whole of it, which ends at 1/32."""
        stage = self.visual.trunk.stages[3]
        if self.training or torch.is_grad_enabled():
            os32 = stage(os16)
            # The same blocks draw their drop-path masks anew in this second pass.
            return stage.blocks(resized), os32
        return two_maps(stage.blocks, resized, stage.downsample(os16))

    def project(self, x: Tensor) -> Tensor:
        """CLIP's head on every pixel of a stage-4 map [B, C, h, w]: embeddings [B, D, h, w]."""
        trunk = self.visual.trunk
        x = trunk.head.norm(trunk.norm_pre(x))
        return self.visual.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def encode_text(self, tokens: Tensor, *, length: int | None = None) -> Tensor:
        """L2-normalised embeddings [T, D] of token rows [T, L] int64.

        The tower is causal and read at the end token, so the rows are cut to the longest prompt, exactly.
        Finding that length reads the tokens (a sync on a GPU) unless `length` gives it.
        """
        longest = self.config.text.context_length
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[1] > longest:
            raise ValueError(
                f"expected tokens [T, L <= {longest}] int64,"
                f" got {list(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
            )
        tokens = tokens[:, : prompt_length(tokens) if length is None else length]
        tokens = tokens.to(self.positional_embedding.device)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        causal = x.new_full((tokens.shape[1], tokens.shape[1]), float("-inf")).triu_(1)
        x = self.ln_final(self.transformer(x, attn_mask=causal))
        # The end token has the largest id; its first occurrence is the end.
        x = x[torch.arange(len(tokens), device=x.device), tokens.argmax(dim=-1)]
        return F.normalize(x @ self.text_projection, dim=-1)

    @torch.no_grad()
    def embed_words(
        self,
        words: Sequence[str],
        *,
        prompt: str,
        batch_size: int = 256,
        progress: Callable[[int, int], object] | None = None,
    ) -> Tensor:
        """L2-normalised embeddings [T, D] of words put into `prompt` at its "{}", without gradient.

        Equal words get bitwise equal rows. `progress(done, total)` is called after each batch of distinct
        words. Raises ErrSegError when the prompt has no "{}" or a reduced vocabulary lacks a word.
        """
        if "{}" not in prompt:
            raise ErrSegError(f"the prompt {prompt!r} has no {{}} for the word")
        distinct = {word: i for i, word in enumerate(dict.fromkeys(words))}
        tokens = self.tokenizer.tokenize([prompt.replace("{}", word) for word in distinct])
        lengths = tokens.argmax(dim=-1) + 1
        rows = self.text_projection.new_empty(len(distinct), self.config.embed_dim)
        done = 0
        # Prompts of similar length together: each batch runs at the length of its longest one.
        order = lengths.argsort(stable=True)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows[batch.to(rows.device)] = self.encode_text(tokens[batch], length=int(lengths[batch].max()))
            done += len(batch)
            if progress is not None:
                progress(done, len(distinct))
        if len(distinct) == len(words):
            return rows
        return rows[torch.tensor([distinct[word] for word in words], device=rows.device)]


def _use_onednn(trunk: nn.Module) -> None:
    from errseg.model.onednn_mlp import use_onednn

    use_onednn(trunk)


def _build_open_clip(config: ClipConfig) -> Any:
    """open_clip's CLIP with random weights; sizes that timm has no name for get their own timm trunk."""
    open_clip = import_open_clip()
    vision, text = config.vision, config.text
    name = "test_convnext"  # timm's smallest, replaced below
    if config.open_clip_name is not None:
        name = open_clip.get_model_config(config.open_clip_name)["vision_cfg"]["timm_model_name"]
    clip = open_clip.CLIP(
        embed_dim=config.embed_dim,
        vision_cfg={
            "timm_model_name": name,
            "timm_pool": "",
            "timm_proj": vision.head,
            "timm_drop": vision.head_drop,
            "timm_drop_path": vision.drop_path,
            "image_size": config.image_size,
        },
        text_cfg={
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
    )
    if config.open_clip_name is None:
        clip.visual.trunk = _build_trunk(config)
        clip.visual.head = _build_head(config)
    return clip


def _build_trunk(config: ClipConfig) -> nn.Module:
    from timm.models import ConvNeXt

    vision = config.vision
    return ConvNeXt(
        num_classes=0,
        global_pool="",
        depths=vision.depths,
        dims=vision.dims,
        ls_init_value=vision.ls_init_value,
        drop_path_rate=vision.drop_path,
    )


def _build_head(config: ClipConfig) -> nn.Sequential:
    """The projection that open_clip's TimmModel puts on a trunk of this width."""
    from timm.layers import Mlp

    width, dim, drop = config.vision.dims[-1], config.embed_dim, config.vision.head_drop
    head = nn.Sequential()
    if config.vision.head == "mlp":
        head.add_module("mlp", Mlp(width, 2 * dim, dim, drop=(drop, 0.0), bias=(True, False)))
    else:
        head.add_module("drop", nn.Dropout(drop))
        head.add_module("proj", nn.Linear(width, dim, bias=False))
    return head


def _stride_one_downsample(downsample: nn.Sequential) -> nn.Sequential:
    """Stage 4's LayerNorm and 2x2 convolution, copied, with zero padding between them and stride 1."""
    from timm.layers import LayerNorm2d

    norm, conv = downsample[0], downsample[1]
    assert isinstance(norm, nn.LayerNorm) and isinstance(conv, nn.Conv2d)
    copy = nn.Sequential(
        LayerNorm2d(norm.normalized_shape[0], eps=norm.eps),
        nn.ZeroPad2d(1),
        nn.Conv2d(conv.in_channels, conv.out_channels, 2),
    )
    copy_downsample(downsample, copy)
    return copy


@torch.no_grad()
def copy_downsample(downsample: nn.Sequential, modified: nn.Sequential) -> None:
    """Copy stage 4's downsampling weights into the stride-1 pair, which is how training starts from CLIP."""
    for source, target in ((downsample[0], modified[0]), (downsample[1], modified[2])):
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name))
