"""The whole ERR-Seg: towers and decoder in one module, made, saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errseg.errors import ErrSegError
from errseg.model.clip import DenseCLIP, copy_downsample
from errseg.model.config import CONFIGS, ModelConfig
from errseg.model.decoder import Decoder, DecoderOutput
from errseg.model.published import (
    CLIP_PREFIX,
    DECODER_PREFIX,
    METADATA_KEY,
    check_state_dict,
    find_checkpoint,
    first_line,
    published_state_dict,
    read_checkpoint,
    read_config,
)
from errseg.model.tokenizer import import_open_clip

# ImageNet's, not CLIP's, as the published weights expect.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

ASSETS = Path(__file__).parent.parent / "assets"


class ERRSeg(nn.Module):
    """CLIP towers and the ERR-Seg decoder (arXiv 2501.17642), with random weights.

    `clip` brings towers that exist already.
    """

    def __init__(self, config: ModelConfig, *, clip: DenseCLIP | None = None) -> None:
        super().__init__()
        self.config = config
        self.clip = DenseCLIP(config.clip) if clip is None else clip
        self.decoder = Decoder(config.decoder)

    def normalize(self, image: Tensor) -> Tensor:
        """RGB values 0..255 [B, 3, S, S], integer or float, to the towers' input in the model's dtype."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected image [B, 3, S, S] with values 0..255, got {list(image.shape)}")
        dtype = self.clip.positional_embedding.dtype
        # Rounded to the model's dtype last; plain numbers, so that nothing is copied to the GPU.
        channels = image.to(torch.promote_types(dtype, torch.float32)).unbind(1)
        scaled = [(x - mean) / std for x, mean, std in zip(channels, MEAN, STD, strict=True)]
        return torch.stack(scaled, dim=1).to(dtype)

    def forward(
        self,
        image: Tensor,
        text_embeddings: Tensor,
        *,
        num_selected: int,
        class_ids: Tensor | None = None,
        required: Tensor | None = None,
    ) -> DecoderOutput:
        """Logits [B, K, S/4, S/4] of the selected classes for RGB images 0..255 [B, 3, S, S].

        S is a multiple of 32; `text_embeddings` [T, D]; `num_selected` K; `class_ids` [B, K] overrides the
        selection; `required` [B, T] bool marks ground truth in training. Wrong shapes raise ValueError.
        """
        features = self.clip(self.normalize(image))
        return self.decoder(
            features,
            text_embeddings,
            num_selected=num_selected,
            class_ids=class_ids,
            required=required,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` (the configuration in its metadata) and `config.json` into a folder."""
        folder = Path(save_directory)
        save_model(self, folder / "model.safetensors", dtype=dtype)
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        _write(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> ERRSeg:
        """Load what `save_pretrained` wrote: a folder, a .safetensors file, a Hugging Face `user/repo`."""
        path = Path(source)
        if path.is_dir():
            path = path / "model.safetensors"
        elif path.suffix != ".safetensors":
            path = find_checkpoint(f"{source}/model.safetensors", "")
        return load_model(path)


def create_model(name: str, weights: str | os.PathLike[str] | None = None, **overrides: Any) -> ERRSeg:
    """A model in evaluation mode on the CPU, float32.

    `name`: "errseg-b", "errseg-l" or "errseg-tiny". `weights`: a checkpoint (.pth, .pt, .bin or
    .safetensors, in the published layout), a folder with one, a Hugging Face `user/repo` or `user/repo/file`;
    "clip" for open_clip's weights in the towers and a fresh decoder; "random". None means "random", but for
    errseg-tiny, a toy world, the weights that come with the package. Only a repository and "clip" download.

    Overrides: `size`, `prompt`, `num_selected`, `drop_path` (towers), `head_drop` (projection of L),
    `drop_path_rate` (decoder), `open_clip_pretrained` (a tag of open_clip or a file, for "clip").
    Raises ErrSegError for an unknown name, weights that do not fit, or an unknown override.
    """
    if name not in CONFIGS:
        raise ErrSegError(f"no model {name!r}: choose one of {', '.join(CONFIGS)}")
    if weights is None:
        weights = ASSETS / "errseg-tiny.safetensors" if name == "errseg-tiny" else "random"
    if weights in ("random", "clip"):
        model = ERRSeg(_override(CONFIGS[name], overrides))
        if weights == "clip":
            load_clip_weights(model.clip)
        return model.eval()
    path = find_checkpoint(weights, name)
    config = read_config(path) or CONFIGS[name]
    if config.name != name:
        raise ErrSegError(f"{path} holds {config.name}, not {name}")
    return _load(_override(config, overrides), path)


def save_model(model: ERRSeg, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write one .safetensors with the published names and the configuration (token ids too) in its metadata.

    `dtype` converts the parameters, None keeps theirs. The file appears only when complete.
    """
    from safetensors.torch import save_file

    state_dict = {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in published_state_dict(model.clip, model.decoder).items()
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(model.config.to_dict())}
    _write(Path(path), lambda temporary: save_file(state_dict, temporary, metadata))


def load_model(path: str | os.PathLike[str]) -> ERRSeg:
    """The model that `save_model` wrote, in evaluation mode on the CPU, float32."""
    config = read_config(path)
    if config is None:
        read_checkpoint(path)  # says what is wrong with a file that cannot be read
        raise ErrSegError(f"{path} does not say which model it is: use create_model(name, weights=...)")
    return _load(config, Path(path))


def load_clip_weights(clip: DenseCLIP) -> None:
    """Give the towers open_clip's weights, through its loader, and `modify_downsample` copies of stage 4's.

    `clip.config.open_clip_pretrained` is one of open_clip's tags, downloaded on first use, or a file.
    """
    open_clip = import_open_clip()
    name, pretrained = clip.config.open_clip_name, clip.config.open_clip_pretrained
    if pretrained is None:
        raise ErrSegError("this model was trained from nothing, there are no CLIP weights for it: use 'random'")
    path: str | None = pretrained
    if not Path(pretrained).is_file():
        known = open_clip.get_pretrained_cfg(name, pretrained)
        if not known:
            raise ErrSegError(f"{pretrained} is neither a file nor weights that open_clip has for {name}")
        try:
            path = open_clip.download_pretrained(known)
        except Exception as error:  # the hub, its HTTP client and any proxy bring their own kinds
            raise ErrSegError(f"no download of open_clip's {name} {pretrained}: {first_line(error)}") from error
    try:
        found = open_clip.load_checkpoint(clip, path, strict=False)
    except Exception as error:  # any that a file of another kind provokes in torch, safetensors or open_clip
        reason = " ".join(str(error).splitlines()[:2])  # the second line names the first misshapen tensor
        raise ErrSegError(f"{path} does not fit {name}: {reason}") from error
    missing = [key for key in found.missing_keys if not key.startswith("visual.modify_downsample.")]
    if missing or found.unexpected_keys:
        fault = f"{missing[0]} is missing" if missing else f"{found.unexpected_keys[0]} does not belong to it"
        raise ErrSegError(f"{path} does not fit {name}: {fault}")
    copy_downsample(clip.visual.trunk.stages[3].downsample, clip.visual.modify_downsample)


def _load(config: ModelConfig, path: Path) -> ERRSeg:
    """A model with the checkpoint's parameters in float32, its towers never initialised at random."""
    state_dict = read_checkpoint(path)
    with torch.device("meta"):
        clip = DenseCLIP(config.clip)
    model = ERRSeg(config, clip=clip)
    check_state_dict(state_dict, published_state_dict(model.clip, model.decoder), str(path))
    for key in list(state_dict):  # one by one copied, since the file may be mapped and may change
        state_dict[key] = state_dict[key].to(torch.float32, copy=True)
    model.clip.load_state_dict(_below(state_dict, CLIP_PREFIX), strict=True, assign=True)
    model.decoder.load_published(_below(state_dict, DECODER_PREFIX))
    return model.eval()


def _below(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _override(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    """The configuration with the few entries replaced that no weight depends on."""
    homes: dict[str, tuple[str, ...]] = {
        "model": ("size", "prompt", "num_selected"),
        "vision": ("drop_path", "head_drop"),
        "decoder": ("drop_path_rate",),
        "clip": ("open_clip_pretrained",),
    }
    known = [key for keys in homes.values() for key in keys]
    if unknown := [key for key in overrides if key not in known]:
        raise ErrSegError(f"create_model has no override {unknown[0]!r}; it has {', '.join(known)}")
    of = {home: {key: overrides[key] for key in keys if key in overrides} for home, keys in homes.items()}
    clip = replace(config.clip, vision=replace(config.clip.vision, **of["vision"]), **of["clip"])
    config = replace(config, clip=clip, decoder=replace(config.decoder, **of["decoder"]), **of["model"])
    if config.size < 32 or config.size % 32:
        raise ErrSegError(f"size {config.size}: the input size must be a multiple of 32")
    return config


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary name beside `path`, then rename: no half-written file is ever seen."""
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files private
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ErrSegError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
