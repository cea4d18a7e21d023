"""Reading checkpoints: files, Hugging Face repositories, and the strict check of every key and shape."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errseg.errors import ErrSegError
from errseg.model.config import CONFIGS, DecoderConfig, ModelConfig

if TYPE_CHECKING:
    from errseg.model.clip import DenseCLIP
    from errseg.model.decoder import Decoder

CLIP_PREFIX = "sem_seg_head.clip_model."
DECODER_PREFIX = "sem_seg_head.decoder."
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
METADATA_KEY = "errseg"

# Words in a file's path that tell which model it holds, e.g. convnextB_640/model_final.pth.
_HINTS = {
    "errseg-b": {"b", "base", "convnextb", "convnextbase", "errsegb"},
    "errseg-l": {"l", "large", "convnextl", "convnextlarge", "errsegl"},
    "errseg-tiny": {"tiny", "errsegtiny"},
}


def published_state_dict(clip: DenseCLIP, decoder: Decoder) -> dict[str, Tensor]:
    """All parameters under the names of the published checkpoints."""
    towers = {CLIP_PREFIX + key: value for key, value in clip.state_dict().items()}
    return towers | decoder.published_state_dict(DECODER_PREFIX)


def check_state_dict(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise ErrSegError naming the first key that is missing, has another shape, or does not belong."""
    faults = []
    for key, value in expected.items():
        if key not in state_dict:
            faults.append(f"{key} is missing")
        elif state_dict[key].shape != value.shape:
            shapes = f"{list(state_dict[key].shape)}, expected {list(value.shape)}"
            faults.append(f"{key} has shape {shapes}")
    faults += [f"{key} does not belong to this model" for key in state_dict if key not in expected]
    if not faults:
        return
    if not any(key in expected for key in state_dict):
        raise ErrSegError(f"{source} is not an ERR-Seg checkpoint: {faults[0]}")
    more = f" (and {len(faults) - 1} more differences{_likely(state_dict)})" if len(faults) > 1 else ""
    raise ErrSegError(f"{source} does not fit the model: {faults[0]}{more}")


def _likely(state_dict: Mapping[str, Tensor]) -> str:
    """A remark on which model the checkpoint seems to be, by its positional embedding."""
    positions = state_dict.get(CLIP_PREFIX + "positional_embedding")
    for name, config in CONFIGS.items():
        text = config.clip.text
        if positions is not None and tuple(positions.shape) == (text.context_length, text.width):
            return f"; it looks like {name}"
    return ""


def decoder_config(tensors: Mapping[str, Tensor], num_heads: int = 4) -> DecoderConfig:
    """Every size of a decoder from the shapes of its published tensors."""

    def shape(key: str) -> torch.Size:
        if key not in tensors:
            raise ErrSegError(f"no {key}: these are not the weights of an ERR-Seg decoder")
        return tensors[key].shape

    taps = [shape(f"img_guidance_projection_dec.{j}.0.weight") for j in range(3)]
    layers = {int(m[1]) for key in tensors if (m := re.match(r"aggregator_layers\.(\d+)\.", key))}
    mlp = shape("aggregator_layers.0.spatial_fusion.sa.mlp.fc1.weight")
    return DecoderConfig(
        text_dim=shape("text_guidance_projection.0.weight")[1],
        guidance_channels=(
            taps[2][1],
            taps[1][1],
            taps[0][1],
            shape("img_guidance_projection_agg.0.0.weight")[1],
        ),
        width=mlp[1],
        num_layers=max(layers) + 1,
        num_heads=num_heads,
        mlp_dim=mlp[0],
        embed_dim=shape("corr_proj_convs.0.0.weight")[0],
        guidance_dim=shape("img_guidance_projection_agg.0.0.weight")[0],
        decoder_guidance=(taps[0][0], taps[1][0], taps[2][0]),
        decoder_dims=(
            shape("up_decoder1.textual_fusion.0.weight")[0],
            shape("up_decoder2.textual_fusion.0.weight")[0],
            shape("up_decoder3.textual_fusion.0.weight")[0],
        ),
    )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, or from .pth, .pt, .bin read as tensors only.

    A pickle may be a bare state dict or a dict whose `model` is one; its other entries are ignored. Raises
    ErrSegError when the file is missing, of another kind, damaged, or holds anything that could run code.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ErrSegError(f"{path}: expected a checkpoint ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ErrSegError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ErrSegError(f"{path} is not a readable safetensors file: {first_line(error)}") from error
    return _tensors(_unpickle(path), path)


def read_config(path: str | os.PathLike[str]) -> ModelConfig | None:
    """The configuration that `save_model` put into a safetensors file, None when there is none."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            return None if text is None else ModelConfig.from_dict(json.loads(text))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ErrSegError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def _unpickle(path: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            magic = file.read(2)
        if magic[:1] != b"\x80" and magic != b"PK":
            raise ErrSegError(f"{path} is not a PyTorch checkpoint (nor a pickle at all)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
            # Mapped, the optimizer states of a training file are never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ErrSegError(
            f"{path} was refused: it is damaged or holds more than tensors, which could run code when loaded"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ErrSegError(f"{path} is truncated or damaged: {first_line(error)}") from error


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise ErrSegError(f"{path} holds no state dict, neither itself nor as its entry 'model'")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ErrSegError(f"{path} holds no state dict: its entry {key!r} is not a tensor")
    return dict(content)


def find_checkpoint(weights: str | os.PathLike[str], name: str) -> Path:
    """Path of a checkpoint of model `name`: a file, a folder, or a Hugging Face `user/repo[/path/to/file]`.

    From a folder or a repository `choose_file` picks. Raises ErrSegError when nothing fits.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        files = (str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file())
        return path / choose_file(files, name, str(path))
    parts = str(weights).split("/")
    is_repo = len(parts) >= 2 and all(re.fullmatch(r"[\w][\w.-]*", part) for part in parts)
    if path.exists() or not is_repo or (len(parts) == 2 and path.suffix in SUFFIXES):
        return path
    return _download("/".join(parts[:2]), "/".join(parts[2:]), name)


def choose_file(files: Iterable[str], name: str, source: str) -> str:
    """The checkpoint of model `name` among `files`, ErrSegError listing the candidates when unclear.

    First those whose path says B, L or tiny as a word of its own (`convnextB_640/...`, `errseg_b.pth`), then
    those that name no model; among them `model.safetensors`, else `model_final` and safetensors come first.
    """
    candidates = [file for file in files if Path(file).suffix in SUFFIXES]
    hinted = [file for file in candidates if _words(file) & _HINTS[name]]
    unclaimed = [file for file in candidates if not any(_words(file) & hints for hints in _HINTS.values())]
    for choice in (hinted, unclaimed):
        if "model.safetensors" in choice:
            return "model.safetensors"
        for preferred in ("model_final", ".safetensors"):
            choice = [file for file in choice if preferred in file] or choice
        if len(choice) == 1:
            return choice[0]
    if not candidates:
        raise ErrSegError(f"{source} holds no checkpoint ({', '.join(SUFFIXES)})")
    raise ErrSegError(f"{source}: which file is {name}? Name one, as {source}/FILE: {', '.join(candidates)}")


def _words(file: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", file.lower()))


def _download(repo: str, file: str, name: str) -> Path:
    import huggingface_hub

    try:
        if not file:
            file = choose_file(_repo_files(repo), name, repo)
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except ErrSegError:
        raise
    except Exception as error:  # the hub, its HTTP client and any proxy bring their own kinds
        raise ErrSegError(
            f"{repo} is neither a local path nor a Hugging Face repository within reach: {first_line(error)}"
        ) from error


def _repo_files(repo: str) -> list[str]:
    """The repository's files, or without a network those already in the local cache."""
    import huggingface_hub

    try:
        return list(huggingface_hub.list_repo_files(repo))
    except Exception:  # see _download
        try:
            folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except Exception:
            folder = None
        if folder is None:
            raise
        return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
