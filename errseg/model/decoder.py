"""The decoder: RRHC, RRCA, and the up-decoder that brings every class map to a quarter of the image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errseg import ops
from errseg.model.channels_last import conv_norm_relu, double_size, one_channel
from errseg.model.clip import DenseFeatures
from errseg.model.config import DecoderConfig
from errseg.model.folding import Foldable
from errseg.model.guidance import Guidance
from errseg.model.published import check_state_dict, decoder_config
from errseg.model.rrca import RRCA
from errseg.model.rrhc import RRHC
from errseg.model.streams import alongside, join
from errseg.ops.checks import expect, expect_class_ids
from errseg.ops.up_step import GROUP_CHANNELS

UNSELECTED_LOGIT = -100.0
CLASSES_AT_ONCE = 8  # through the up-decoder, in inference on a CPU: its maps are the largest of all


class DecoderOutput(NamedTuple):
    """Logits [B, K, 4H, 4W] of the selected classes and their ids [B, K] int64, ascending unless given."""

    logits: Tensor
    class_ids: Tensor

    def dense(self, vocabulary_size: int) -> Tensor:
        """[B, T, 4H, 4W] with -100 for the classes that were not selected (published layout)."""
        batch, _, height, width = self.logits.shape
        dense = self.logits.new_full((batch, vocabulary_size, height, width), UNSELECTED_LOGIT)
        index = self.class_ids[:, :, None, None].expand_as(self.logits)
        return dense.scatter_(1, index, self.logits)


class UpStep(Foldable):
    """Bring maps up, add guidance, and refine with two convolutions, each GroupNorm and ReLU."""

    def __init__(self, in_channels: int, guidance_channels: int, channels: int, *, upsample: bool) -> None:
        super().__init__()
        up: nn.Module = nn.Conv2d(in_channels, channels, 1)
        if upsample:
            up = nn.ConvTranspose2d(in_channels, channels, 2, stride=2)
        self.up_conv = up
        self.conv1 = nn.Conv2d(channels + guidance_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(channels // GROUP_CHANNELS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(channels // GROUP_CHANNELS, channels)

    def published_params(self, *norms: nn.LayerNorm) -> ops.UpStepParams:
        """The published tensors as the op takes them."""
        tensors = dict(self.named_parameters())
        return ops.UpStepParams(**{name.replace("up_conv", "up").replace(".", "_"): t for name, t in tensors.items()})

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """x [B, K, H, W, C], guidance [B, G, H', W'] -> [B, K, H', W', C'], H' = H or 2H.

        A CPU goes layer by layer: faster there than the op's reference, and less is kept for the backward pass.
        """
        return self.by_layers(x, guidance) if x.device.type == "cpu" else self.by_op(x, guidance)

    def by_op(self, x: Tensor, guidance: Tensor) -> Tensor:
        """The step as one op."""
        return ops.up_step(x, guidance, self.params(), eps=self.norm1.eps)

    def by_layers(self, x: Tensor, guidance: Tensor) -> Tensor:
        """The step layer by layer.

        The first convolution runs over [x, guidance]; its guidance part is the same for every class of an image
        and is computed once for all that come together.
        """
        maps = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels last in memory
        up = double_size(self.up_conv, maps)
        own, shared = self.conv1.weight.split((up.shape[1], guidance.shape[1]), dim=1)
        by_image = F.conv2d(guidance.contiguous(memory_format=torch.channels_last), shared, padding=1)
        mixed = conv_norm_relu(up, own, self.norm1, by_image)
        refined = conv_norm_relu(mixed, self.conv2.weight, self.norm2)
        return refined.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class Upsampler(nn.Module):
    """Three steps from 1/16 to 1/4 of the image and a 1x1 head: tokens [B,K,H,W,C] -> logits [B,K,4H,4W]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        widths = (config.width, *config.decoder_dims)
        self.steps = nn.ModuleList(
            UpStep(widths[j], config.decoder_guidance[j], widths[j + 1], upsample=j > 0) for j in range(3)
        )
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor, guidance: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Logits from the refined embedding and one guidance map per step."""
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return torch.cat([self._upsample(part, guidance) for part in x.split(CLASSES_AT_ONCE, dim=1)], dim=1)
        return self._upsample(x, guidance)

    def _upsample(self, x: Tensor, guidance: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        for step, step_guidance in zip(self.steps, guidance, strict=True):
            x = step(x, step_guidance)
        return one_channel(self.head, x.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, x.shape[:2])


class Decoder(nn.Module):
    """From dense CLIP features and word embeddings to logits of the K classes that the image keeps."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.rrhc = RRHC(config)
        self.guidance = Guidance(config)
        self.rrca = RRCA(config)
        self.upsampler = Upsampler(config)

    def forward(
        self,
        features: DenseFeatures,
        text_embeddings: Tensor,
        *,
        num_selected: int,
        class_ids: Tensor | None = None,
        required: Tensor | None = None,
    ) -> DecoderOutput:
        """Segment by words.

        Args:
            features: taps and pixel embeddings; os16 is [B, ., H, W].
            text_embeddings: [T, D], any length, T >= 1.
            num_selected: K >= 1; fewer words than K are all kept.
            class_ids: [B, K] int64 in [0, T), overrides the selection.
            required: [B, T] bool, ground-truth classes that the selection must keep (training).

        Returns:
            logits [B, K, 4H, 4W] and class ids [B, K].

        Raises:
            ValueError: on wrong shapes or types.
        """
        dim = self.config.text_dim
        good = text_embeddings.ndim == 2 and text_embeddings.shape[1] == dim and text_embeddings.shape[0] > 0
        expect(good, f"text_embeddings [T, {dim}] with T >= 1", text_embeddings)
        expect(num_selected >= 1, "num_selected >= 1", num_selected)
        if class_ids is not None:
            expect_class_ids(class_ids, features.os16.shape[0])
        guidance, branch = alongside(features.os16.device, lambda: self.guidance(features))
        embedding, class_ids = self.rrhc(
            features.os16_dense,
            features.os32_dense,
            text_embeddings,
            num_selected=num_selected,
            class_ids=class_ids,
            required=required,
        )
        text_guidance = self.guidance.of_words(text_embeddings, class_ids)
        join(branch)
        refined = self.rrca(embedding, guidance.aggregation, text_guidance)
        return DecoderOutput(self.upsampler(refined, guidance.decoder), class_ids)

    def keep_folded(self) -> None:
        """Compose the parameters once instead of in every call; undone by training, loading and moving them.

        For inference: gradients no longer arrive at the parameters.
        """
        self.eval()
        self.rrhc.embedding.keep_folded()
        self.rrca.keep_folded()
        for step in self.upsampler.steps:
            assert isinstance(step, UpStep)
            step.keep_folded()

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], prefix: str = "", num_heads: int = 4) -> Decoder:
        """Build a decoder from published tensors, every size but ``num_heads`` read off their shapes.

        Args:
            state_dict: published names behind ``prefix``; other names are ignored when a prefix is given.
            prefix: for example ``"sem_seg_head.decoder."``.
            num_heads: attention heads, not derivable from shapes.

        Raises:
            ErrSegError: naming the first key that is missing, extra or misshapen.
        """
        tensors = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        decoder = cls(decoder_config(tensors, num_heads))
        dtype = next(iter(tensors.values())).dtype
        decoder.to(dtype).load_published(tensors)
        return decoder

    def published_state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The parameters under their published names."""
        return {prefix + published_name(name): value for name, value in self.state_dict().items()}

    def load_published(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy published tensors in; strict about names and shapes.

        Raises:
            ErrSegError: naming the first key that is missing, extra or misshapen.
        """
        check_state_dict(state_dict, self.published_state_dict(prefix), "the decoder's checkpoint")
        names = {prefix + published_name(name): name for name in self.state_dict()}
        self.load_state_dict({names[key]: value for key, value in state_dict.items()})


_PUBLISHED_NAMES = (
    (r"^rrhc\.embedding\.conv16\.", "corr_proj_convs.0.0."),
    (r"^rrhc\.embedding\.conv32\.", "corr_proj_convs.1.0."),
    (r"^rrhc\.embedding\.fusion\.", "low_corr_fusion."),
    (r"^guidance\.aggregation\.conv32\.", "img_guidance_projection_agg.0.0."),
    (r"^guidance\.aggregation\.conv16\.", "img_guidance_projection_agg.1.0."),
    (r"^guidance\.aggregation\.fusion\.", "low_img_fusion."),
    (r"^guidance\.decoder\.(\d)\.", r"img_guidance_projection_dec.\1.0."),
    (r"^guidance\.text\.", "text_guidance_projection.0."),
    (r"^rrca\.layers\.(\d+)\.spatial\.", r"aggregator_layers.\1.spatial_fusion.sa."),
    (r"^rrca\.layers\.(\d+)\.classes\.", r"aggregator_layers.\1.class_fusion.sa."),
    (r"mlp\.dwconv\.", "mlp.dwconv.dwconv."),
    (r"^upsampler\.steps\.0\.", "up_decoder1."),
    (r"^upsampler\.steps\.1\.", "up_decoder2."),
    (r"^upsampler\.steps\.2\.", "up_decoder3."),
    (r"^(up_decoder\d)\.conv1\.", r"\1.textual_fusion.0."),
    (r"^(up_decoder\d)\.norm1\.", r"\1.textual_fusion.1."),
    (r"^(up_decoder\d)\.conv2\.", r"\1.textual_fusion.3."),
    (r"^(up_decoder\d)\.norm2\.", r"\1.textual_fusion.4."),
    (r"^upsampler\.head\.", "head."),
)


def published_name(name: str) -> str:
    """The published name of one of the decoder's parameters."""
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
