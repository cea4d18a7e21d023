"""The decoder of ERR-Seg (arXiv 2501.17642) in the published order of operations: the in-house yardstick.

Slow, simple and eager: every restructuring of `errseg.model.decoder.Decoder` is left out on purpose. Cost
volumes span the vocabulary, wide 7x7 convolutions run on every class map, guidance is repeated for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from errseg.model.config import DecoderConfig
from errseg.model.published import check_state_dict, decoder_config

if TYPE_CHECKING:
    from errseg.model.decoder import DecoderOutput

GUIDANCE_LIMIT = 16.0
UNSELECTED_LOGIT = -100.0
VOTE_WEIGHTS = (100, 10, 1)


class FeatureMaps(Protocol):
    """What the decoder reads: four backbone taps and two dense CLIP maps, each [B, C, h, w]."""

    @property
    def os4(self) -> Tensor: ...
    @property
    def os8(self) -> Tensor: ...
    @property
    def os16(self) -> Tensor: ...
    @property
    def os32(self) -> Tensor: ...
    @property
    def os16_dense(self) -> Tensor: ...
    @property
    def os32_dense(self) -> Tensor: ...


def published_cost_volume(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """Cosines in [-1, 1] of every pixel with every word: [B, D, H, W], [T, D] -> [B, T, H, W]."""
    image_embeddings = F.normalize(image_embeddings, dim=1)
    text_embeddings = F.normalize(text_embeddings, dim=-1)
    return torch.einsum("bdhw,td->bthw", image_embeddings, text_embeddings)


def published_votes(cost: Tensor) -> Tensor:
    """Integer votes [B, T] int64 of a full volume [B, T, H, W]: 100, 10, 1 for a pixel's best three words.

    Equal cosines rank the lowest id first.
    """
    batch, vocabulary_size = cost.shape[:2]
    votes = torch.zeros(batch, vocabulary_size, dtype=torch.int64, device=cost.device)
    remaining = cost.detach().clone()
    for weight in VOTE_WEIGHTS[:vocabulary_size]:
        winners = remaining.argmax(dim=1, keepdim=True)  # the first of several maxima
        for image in range(batch):
            votes[image] += weight * torch.bincount(winners[image].flatten(), minlength=vocabulary_size)
        remaining.scatter_(1, winners, -torch.inf)
    return votes


def published_selection(votes: Tensor, num_selected: int, required: Tensor | None = None) -> Tensor:
    """Ids [B, min(K, T)] int64, ascending, of the classes with most votes [B, T].

    `required` [B, T] bool puts an image's ground-truth classes first; the voted ones fill up by id.
    Equal votes go to the lowest id. Raises ValueError for K < 1 or another shape of `required`.
    """
    _check_selection(votes, num_selected, required)
    chosen = []
    for image, counts in enumerate(votes.tolist()):
        by_votes = sorted(range(len(counts)), key=lambda word: (-counts[word], word))[:num_selected]
        candidates = sorted(by_votes)
        if required is not None:
            truth = required[image].nonzero().flatten().tolist()
            candidates = truth + [word for word in candidates if word not in truth]
        chosen.append(sorted(candidates[:num_selected]))
    return torch.tensor(chosen, dtype=torch.int64, device=votes.device).reshape(len(chosen), -1)


def _check_selection(votes: Tensor, num_selected: int, required: Tensor | None) -> None:
    if num_selected < 1:
        raise ValueError(f"expected num_selected >= 1, got {num_selected}")
    if required is not None and (required.shape != votes.shape or required.dtype != torch.bool):
        raise ValueError(f"expected required {list(votes.shape)} bool, got {list(required.shape)} {required.dtype}")


def gather_classes(values: Tensor, class_ids: Tensor) -> Tensor:
    """[B, T, ...], [B, K] -> [B, K, ...]."""
    return torch.stack([image[ids] for image, ids in zip(values, class_ids, strict=True)])


class DropPath(nn.Module):
    """Drops whole samples of a residual branch and divides the kept ones by the keep probability."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def draw(self, x: Tensor) -> Tensor:
        """A fresh mask for the samples of x, [N, 1, ...], already divided by the keep probability."""
        keep = 1.0 - self.drop_prob
        return x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x) if self.training and self.drop_prob > 0 else x


class GuidedAttention(nn.Module):
    """What both attentions share: queries from [tokens, guidance], several heads, an output projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(2 * width, width)
        self.k = nn.Linear(2 * width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, L, C], [N, S, C], [N, S, C] -> [N, L, C]; the scale is head_dim ** -0.5."""
        query, key, value = (
            rearrange(tokens, "n l (h d) -> n h l d", h=self.num_heads) for tokens in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(mixed, "n h l d -> n l (h d)"))


class SpatialAttention(GuidedAttention):
    """Pixels attend to pixels of a map shortened by strided convolutions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.sr_k = nn.Conv2d(2 * width, 2 * width, kernel_size=2, stride=2)
        self.norm_k = nn.LayerNorm(2 * width)
        self.sr_v = nn.Conv2d(width, width, kernel_size=2, stride=2)
        self.norm_v = nn.LayerNorm(width)

    def forward(self, x: Tensor, guidance: Tensor, size: tuple[int, int]) -> Tensor:
        guided = torch.cat([x, guidance], dim=-1)
        key = self.k(self.norm_k(_shorten(guided, self.sr_k, size)))
        value = self.v(self.norm_v(_shorten(x, self.sr_v, size)))
        return self.attend(self.q(guided), key, value)


def _shorten(tokens: Tensor, convolution: nn.Module, size: tuple[int, int]) -> Tensor:
    """[N, H*W, C] -> [N, (H//2)*(W//2), C]."""
    maps = rearrange(tokens, "n (h w) c -> n c h w", h=size[0], w=size[1])
    return rearrange(convolution(maps), "n c h w -> n (h w) c")


class ClassAttention(GuidedAttention):
    """The classes at one pooled pixel attend to each other."""

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        guided = torch.cat([x, guidance], dim=-1)
        return self.attend(self.q(guided), self.k(guided), self.v(x))


class GatedMLP(nn.Module):
    """W3(ReLU6(W1 x) * W2 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(width, hidden)
        self.fc3 = nn.Linear(hidden, width)

    def gate(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu6(self.fc1(x)) * self.fc2(x))


class SpatialMLP(GatedMLP):
    """The gated MLP, then a 7x7 depthwise convolution over the pixels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(width, width, 7, padding=3, groups=width)})

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        maps = rearrange(self.gate(x), "n (h w) c -> n c h w", h=size[0], w=size[1])
        return rearrange(self.dwconv["dwconv"](maps), "n c h w -> n (h w) c")


class ClassMLP(GatedMLP):
    """The gated MLP with a ReLU6 behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.gate(x))


class SpatialBlock(nn.Module):
    """Pre-norm attention and MLP over the pixels of each class map: [N, H*W, C] -> [N, H*W, C]."""

    def __init__(self, width: int, num_heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SpatialAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = SpatialMLP(width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, guidance: Tensor, size: tuple[int, int]) -> Tensor:
        attended = x + self.drop_path(self.attention(self.norm1(x), guidance, size))
        return attended + self.drop_path(self.mlp(self.norm2(attended), size))


class ClassBlock(nn.Module):
    """Pre-norm attention and MLP over the classes of each pooled pixel: [N, K, C] -> [N, K, C]."""

    def __init__(self, width: int, num_heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = ClassAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = ClassMLP(width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        attended = x + self.drop_path(self.attention(self.norm1(x), guidance))
        return attended + self.drop_path(self.mlp(self.norm2(attended)))


class AggregatorLayer(nn.Module):
    """One RRCA layer, spatial then class."""

    def __init__(self, width: int, num_heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.spatial_fusion = nn.ModuleDict({"sa": SpatialBlock(width, num_heads, hidden, drop_path)})
        self.class_fusion = nn.ModuleDict({"sa": ClassBlock(width, num_heads, hidden, drop_path)})

    def forward(self, x: Tensor, guidance: Tensor, text_guidance: Tensor) -> Tensor:
        """[B*K, C, H, W], [B, C, H, W], [B, K, C] -> [B*K, C, H, W]."""
        num_classes, size = text_guidance.shape[1], (x.shape[-2], x.shape[-1])
        x = self.refine_space(x, repeat(guidance, "b c h w -> (b k) (h w) c", k=num_classes), size)
        refined = self.refine_classes(x, text_guidance)
        return x + F.interpolate(refined, size, mode="bilinear", align_corners=True)

    def refine_space(self, x: Tensor, guidance: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = rearrange(x, "n c h w -> n (h w) c")
        tokens = self.spatial_fusion["sa"](tokens, guidance, size)
        return rearrange(tokens, "n (h w) c -> n c h w", h=size[0], w=size[1])

    def refine_classes(self, x: Tensor, text_guidance: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 2)
        height, width = pooled.shape[-2:]
        tokens = rearrange(pooled, "(b k) c h w -> (b h w) k c", k=text_guidance.shape[1])
        guidance = repeat(text_guidance, "b k c -> (b h w) k c", h=height, w=width)
        tokens = self.class_fusion["sa"](tokens, guidance)
        return rearrange(tokens, "(b h w) k c -> (b k) c h w", h=height, w=width)


class UpDecoderStep(nn.Module):
    """Upsample, concatenate guidance, twice [conv 3x3, GroupNorm, ReLU]."""

    def __init__(self, up_conv: nn.Module, out_channels: int, guidance_channels: int) -> None:
        super().__init__()
        self.up_conv = up_conv
        layers: list[nn.Module] = []
        for in_channels in (out_channels + guidance_channels, out_channels):
            layers.append(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False))
            layers.append(nn.GroupNorm(out_channels // 8, out_channels))
            layers.append(nn.ReLU())
        self.textual_fusion = nn.Sequential(*layers)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """[B*K, C, h, w], [B, G, h', w'] -> [B*K, C', h', w']."""
        num_classes = x.shape[0] // guidance.shape[0]
        guidance = repeat(guidance, "b c h w -> (b k) c h w", k=num_classes)
        return self.textual_fusion(torch.cat([self.up_conv(x), guidance], dim=1))


class PublishedDecoder(nn.Module):
    """RRHC, RRCA and up-decoder as published, under the published state-dict names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, (os4, os8, os16, os32) = config.width, config.guidance_channels
        self.corr_proj_convs = _projections((1, 1), (config.embed_dim, config.embed_dim), 7)
        self.low_corr_fusion = nn.Conv2d(config.embed_dim, width, kernel_size=1)
        self.img_guidance_projection_agg = _projections((os32, os16), (config.guidance_dim,) * 2, 3)
        self.low_img_fusion = nn.Conv2d(config.guidance_dim, width, kernel_size=1)
        self.img_guidance_projection_dec = _projections((os16, os8, os4), config.decoder_guidance, 3)
        self.text_guidance_projection = nn.Sequential(nn.Linear(config.text_dim, width), nn.GELU())
        self.aggregator_layers = nn.ModuleList(
            AggregatorLayer(width, config.num_heads, config.mlp_dim, layer * config.drop_path_rate)
            for layer in range(config.num_layers)
        )
        (first, second, third), guides = config.decoder_dims, config.decoder_guidance
        self.up_decoder1 = UpDecoderStep(nn.Conv2d(width, first, 1), first, guides[0])
        self.up_decoder2 = UpDecoderStep(nn.ConvTranspose2d(first, second, 2, 2), second, guides[1])
        self.up_decoder3 = UpDecoderStep(nn.ConvTranspose2d(second, third, 2, 2), third, guides[2])
        self.head = nn.Conv2d(third, 1, kernel_size=1)

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        prefix: str = "",
        num_heads: int = 4,
        drop_path_rate: float = 0.025,
    ) -> PublishedDecoder:
        """A decoder with copies of the published tensors under `prefix`, sizes read off their shapes.

        Raises ErrSegError naming the first key that is missing, unknown or misshapen.
        """
        weights = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)}
        config = replace(decoder_config(weights, num_heads), drop_path_rate=drop_path_rate)
        with torch.device("meta"):
            decoder = cls(config)
        check_state_dict(weights, decoder.state_dict(), "the decoder's checkpoint")
        decoder.load_state_dict({key: t.detach().clone() for key, t in weights.items()}, assign=True)
        return decoder

    def forward(
        self,
        features: FeatureMaps,
        text_embeddings: Tensor,
        *,
        num_selected: int,
        class_ids: Tensor | None = None,
        required: Tensor | None = None,
    ) -> DecoderOutput:
        """Logits [B, K, 4H, 4W] of the selected classes, from features and word embeddings [T, D].

        `class_ids` [B, K] int64 overrides the selection; `required` [B, T] bool are ground-truth classes.
        Raises ValueError for text of another width, for K < 1 or another shape of `required`.
        """
        from errseg.model.decoder import DecoderOutput

        _check_text(features, text_embeddings)
        cost16 = published_cost_volume(features.os16_dense, text_embeddings)
        cost32 = published_cost_volume(features.os32_dense, text_embeddings)
        if class_ids is None:
            class_ids = published_selection(published_votes(cost16), num_selected, required)
        x = self.embed_costs(gather_classes(cost16, class_ids), gather_classes(cost32, class_ids))
        guidance, *decoder_guidance = self.project_guidance(features)
        text_guidance = self.project_text(text_embeddings[class_ids])
        for layer in self.aggregator_layers:
            x = layer(x, guidance, text_guidance)
        steps = (self.up_decoder1, self.up_decoder2, self.up_decoder3)
        for step, step_guidance in zip(steps, decoder_guidance, strict=True):
            x = step(x, step_guidance)
        logits = rearrange(self.head(x), "(b k) 1 h w -> b k h w", b=len(class_ids))
        return DecoderOutput(logits=logits, class_ids=class_ids)

    def embed_costs(self, cost16: Tensor, cost32: Tensor) -> Tensor:
        """[B, K, H, W], [B, K, h, w] -> [B*K, C, H, W]."""
        fine, coarse = (
            convolution(rearrange(cost, "b k h w -> (b k) 1 h w"))
            for convolution, cost in zip(self.corr_proj_convs, (cost16, cost32), strict=True)
        )
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.low_corr_fusion((fine + coarse) / 2)

    def project_guidance(self, features: FeatureMaps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Aggregation guidance [B, C, H, W], then decoder guidance at 1/16, 1/8 and 1/4."""
        os4, os8, os16, os32 = (
            tap.clamp(-GUIDANCE_LIMIT, GUIDANCE_LIMIT)
            for tap in (features.os4, features.os8, features.os16, features.os32)
        )
        coarse, fine = (
            F.relu6(convolution(tap))
            for convolution, tap in zip(self.img_guidance_projection_agg, (os32, os16), strict=True)
        )
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        guidance = self.low_img_fusion((coarse + fine) / 2)
        taps = (os16.detach(), os8, os4)
        at16, at8, at4 = (
            F.relu6(convolution(tap)) for convolution, tap in zip(self.img_guidance_projection_dec, taps, strict=True)
        )
        return guidance, at16, at8, at4

    def project_text(self, text_embeddings: Tensor) -> Tensor:
        """[B, K, D] -> [B, K, C]."""
        return self.text_guidance_projection(F.normalize(text_embeddings, dim=-1))


def _projections(ins: tuple[int, ...], outs: tuple[int, ...], kernel_size: int) -> nn.ModuleList:
    """One convolution of `same` size per pair, each in a Sequential of its own for the sake of its name."""
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(i, o, kernel_size, padding=kernel_size // 2)) for i, o in zip(ins, outs, strict=True)
    )


def _check_text(features: FeatureMaps, text_embeddings: Tensor) -> None:
    width = features.os16_dense.shape[1]
    if text_embeddings.ndim != 2 or text_embeddings.shape[1] != width:
        raise ValueError(f"expected text_embeddings [T, {width}], got {list(text_embeddings.shape)}")


def published_dense(logits: Tensor, class_ids: Tensor, vocabulary_size: int) -> Tensor:
    """Logits [B, K, h, w] scattered to [B, T, h, w], -100 elsewhere; at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    dense = logits.new_full((len(logits), vocabulary_size, *logits.shape[-2:]), UNSELECTED_LOGIT, dtype=dtype)
    images = torch.arange(len(logits), device=logits.device)[:, None]
    return dense.index_put((images, class_ids), logits.to(dtype))


def published_loss(logits_dense: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Binary cross-entropy, mean over B*H*W*T, of logits [B, T, h, w] against target [B, H, W]."""
    logits = F.interpolate(logits_dense, target.shape[-2:], mode="bilinear", align_corners=False)
    logits = rearrange(logits, "b t h w -> b h w t").to(torch.promote_types(logits.dtype, torch.float32))
    counted = target != ignore_index
    truth = torch.zeros_like(logits)
    truth[counted] = F.one_hot(target[counted].long(), logits.shape[-1]).to(truth.dtype)
    return F.binary_cross_entropy_with_logits(logits, truth)


def published_labels(logits_dense: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels [B, H, W] int32 of logits [B, T, h, w]: sigmoid, bilinear to `size`, argmax over T."""
    probabilities = logits_dense.to(torch.promote_types(logits_dense.dtype, torch.float32)).sigmoid()
    probabilities = F.interpolate(probabilities, size, mode="bilinear", align_corners=False)
    return probabilities.argmax(dim=1).to(torch.int32)


def trace_intermediates(
    decoder: PublishedDecoder, features: FeatureMaps, text_embeddings: Tensor, class_ids: Tensor
) -> dict[str, Tensor]:
    """Every named value between costs and logits, under the names and layouts of the golden fixtures.

    Class maps are [B, K, C, h, w]; `layer{i}.spatial_attn_out`, `.after_spatial`, `.class_lowres` and `.out`.
    """
    batch, (height, width) = len(class_ids), features.os16.shape[-2:]
    maps = {"b": batch, "h": height, "w": width}
    low = {"b": batch, "h": height // 2, "w": width // 2}
    as_is, split = "... -> ...", "(b k) c h w -> b k c h w"
    pixels, classes = "(b k) (h w) c -> b k c h w", "(b h w) k c -> b k c h w"
    points: list[tuple[str, nn.Module, str, dict[str, int]]] = [
        ("cost_embed", decoder.low_corr_fusion, split, maps),
        ("image_guidance", decoder.low_img_fusion, as_is, {}),
        ("text_guidance", decoder.text_guidance_projection, as_is, {}),
    ]
    for index, layer in enumerate(decoder.aggregator_layers):
        assert isinstance(layer, AggregatorLayer)
        space, over_classes = layer.spatial_fusion["sa"], layer.class_fusion["sa"]
        assert isinstance(space, SpatialBlock)
        points += [
            (f"layer{index}.spatial_attn_out", space.attention, pixels, maps),
            (f"layer{index}.after_spatial", space, pixels, maps),
            (f"layer{index}.class_lowres", over_classes, classes, low),
            (f"layer{index}.out", layer, split, maps),
        ]
    for index, step in enumerate((decoder.up_decoder1, decoder.up_decoder2, decoder.up_decoder3), start=1):
        points.append((f"up{index}", step, split, {"b": batch}))
    found: dict[str, Tensor] = {}

    def keep(name: str, pattern: str, sizes: dict[str, int]) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            found[name] = rearrange(output, pattern, **sizes)

        return hook

    handles = [module.register_forward_hook(keep(name, p, s)) for name, module, p, s in points]  # type: ignore[arg-type]
    try:
        output = decoder(features, text_embeddings, num_selected=class_ids.shape[1], class_ids=class_ids)
    finally:
        for handle in handles:
            handle.remove()
    _, *decoder_guidance = decoder.project_guidance(features)
    found |= {f"dec_guidance{index}": value for index, value in enumerate(decoder_guidance, start=1)}
    return found | {"logits": output.logits}
