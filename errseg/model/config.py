"""Sizes of the three models as frozen dataclasses that go to JSON and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from errseg.errors import ErrSegError

PROMPT = "A photo of a {} in the scene"


@dataclass(frozen=True)
class VisionConfig:
    """A ConvNeXt trunk with its projection head."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    head: str = "linear"  # "linear" (no bias) or "mlp" (fc1, GELU, dropout, fc2)
    ls_init_value: float = 1e-6
    drop_path: float = 0.0  # of the last block; rises linearly from 0 over all blocks
    head_drop: float = 0.0  # inside the "mlp" head, between GELU and fc2


@dataclass(frozen=True)
class TextConfig:
    """A causal CLIP text tower; `token_ids` lists the BPE ids a reduced vocabulary keeps."""

    width: int
    heads: int
    layers: int
    context_length: int = 77
    vocab_size: int = 49408
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ClipConfig:
    """Both CLIP towers; the open_clip names say which weights `weights="clip"` fetches."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    open_clip_name: str | None = None
    open_clip_pretrained: str | None = None
    image_size: int = 640

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClipConfig:
        """Inverse of `dataclasses.asdict`, raising ErrSegError on unknown or missing entries."""
        return _build(
            cls,
            values,
            vision=lambda vision: _build(VisionConfig, vision),
            text=lambda text: _build(TextConfig, text),
        )


@dataclass(frozen=True)
class DecoderConfig:
    """RRHC, RRCA and the up-decoder (arXiv 2501.17642, section 3)."""

    text_dim: int  # D
    guidance_channels: tuple[int, int, int, int]  # widths of os4, os8, os16, os32
    width: int = 128  # C
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 384
    embed_dim: int = 256  # the two 7x7 convolutions over the cost maps
    guidance_dim: int = 256  # the two 3x3 convolutions of the aggregation guidance
    decoder_guidance: tuple[int, int, int] = (32, 16, 8)
    decoder_dims: tuple[int, int, int] = (64, 32, 16)
    drop_path_rate: float = 0.025  # layer i drops with probability i times this

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of `dataclasses.asdict`, raising ErrSegError on unknown or missing entries."""
        return _build(cls, values)


@dataclass(frozen=True)
class ModelConfig:
    """A whole ERR-Seg: towers, decoder, and how pictures and words are fed to it."""

    name: str
    clip: ClipConfig
    decoder: DecoderConfig
    prompt: str = PROMPT
    size: int = 640  # S, the square input size in pixels, a multiple of 32
    num_selected: int | None = None  # K; None: by the size of the vocabulary

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON (tuples become lists there)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`, raising ErrSegError on unknown or missing entries."""
        return _build(cls, values, clip=ClipConfig.from_dict, decoder=DecoderConfig.from_dict)


def _build(cls: Any, values: Any, **parts: Callable[[Any], Any]) -> Any:
    """Dataclass from a mapping; lists become tuples, entries named in `parts` go through those functions."""
    if not isinstance(values, Mapping):
        raise ErrSegError(f"model configuration: expected the entries of {cls.__name__}, got {values!r}")
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ErrSegError(f"model configuration: {cls.__name__} has no entry {unknown[0]!r}; it has {sorted(known)}")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    built = {key: parts[key](value) if key in parts else value for key, value in plain.items()}
    try:
        return cls(**built)
    except TypeError as error:
        raise ErrSegError(f"model configuration: {error}") from error


# BPE ids of the toy world's prompt words, backgrounds, colours, shapes, "striped", "thing", start and end.
TINY_TOKEN_IDS = (
    *(320, 518, 530, 539, 736, 946, 1125, 1449, 1565, 1573, 1579, 1704, 1746, 1901, 1936, 2390, 2540, 3293),
    *(3417, 3562, 3999, 4055, 4287, 4481, 5094, 5496, 5922, 7117, 9518, 10607, 11149, 14615, 22192, 27054),
    *(49406, 49407),
)

_BASE = (128, 256, 512, 1024)
_LARGE = (192, 384, 768, 1536)
_TINY = (24, 48, 96, 192)

CONFIGS: dict[str, ModelConfig] = {
    "errseg-b": ModelConfig(
        name="errseg-b",
        clip=ClipConfig(
            embed_dim=640,
            vision=VisionConfig(depths=(3, 3, 27, 3), dims=_BASE),
            text=TextConfig(width=640, heads=10, layers=12),
            open_clip_name="convnext_base_w_320",
            open_clip_pretrained="laion_aesthetic_s13b_b82k",
        ),
        decoder=DecoderConfig(text_dim=640, guidance_channels=_BASE),
    ),
    "errseg-l": ModelConfig(
        name="errseg-l",
        clip=ClipConfig(
            embed_dim=768,
            vision=VisionConfig(depths=(3, 3, 27, 3), dims=_LARGE, head="mlp", drop_path=0.1, head_drop=0.1),
            text=TextConfig(width=768, heads=12, layers=16),
            open_clip_name="convnext_large_d_320",
            open_clip_pretrained="laion2b_s29b_b131k_ft_soup",
            image_size=768,
        ),
        decoder=DecoderConfig(text_dim=768, guidance_channels=_LARGE),
        size=768,
    ),
    "errseg-tiny": ModelConfig(
        name="errseg-tiny",
        clip=ClipConfig(
            embed_dim=128,
            vision=VisionConfig(depths=(2, 2, 4, 2), dims=_TINY, ls_init_value=0.5),
            text=TextConfig(width=64, heads=4, layers=2, context_length=16, vocab_size=36, token_ids=TINY_TOKEN_IDS),
            image_size=160,
        ),
        decoder=DecoderConfig(
            text_dim=128,
            guidance_channels=_TINY,
            width=64,
            num_layers=2,
            mlp_dim=192,
            embed_dim=128,
            guidance_dim=128,
            decoder_guidance=(16, 16, 8),
            decoder_dims=(32, 16, 8),
            drop_path_rate=0.0,
        ),
        size=160,
        num_selected=16,
    ),
}
