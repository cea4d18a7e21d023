"""Loads modules of a user's checkout of the published ERR-Seg code, without detectron2 and under private names."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errseg.errors import ErrSegError
from errseg.model.config import ClipConfig, DecoderConfig
from errseg.model.errseg import MEAN, STD

MODELING = Path("err_seg/modeling")
MODULES = MODELING / "modules"
META_ARCHITECTURE = Path("err_seg/err_seg_model.py")
OPEN_CLIP = Path("open_clip/src/open_clip")
_PREFIX = "_errseg_official"


@dataclass(frozen=True)
class OfficialCode:
    """What the checkout defines: its Decoder, its CLIP, its tokenizer and the forward pass of its ERRSeg."""

    decoder_module: Any
    clip_module: Any
    timm_module: Any
    tokenizer_module: Any
    meta_architecture: Any
    root: Path

    def decoder(self, config: DecoderConfig, num_selected: int) -> Any:
        """Its decoder with random weights; drop path is off, as it is random."""
        os4, os8, os16, os32 = config.guidance_channels
        decoder = self.decoder_module.Decoder(
            corr_fpn_inter_dim=config.embed_dim,
            corr_fpn_fusion_dim=config.width,
            guidance_fpn_inter_dim=config.guidance_dim,
            guidance_fpn_fusion_dim=config.width,
            image_guidance_dims=[os32, os16, os8, os4],
            decoder_guidance_dims=(os16, os8, os4),
            guidance_proj_dims=config.decoder_guidance,
            text_guidance_dim=config.text_dim,
            text_guidance_proj_dim=config.width,
            aggregator_scale_ratio=[2] * config.num_layers,
            aggregator_dim=config.width,
            decoder_dims=config.decoder_dims,
            sample_classes_num=num_selected,
        )
        return without_drop_path(decoder)

    def clip(self, config: ClipConfig) -> Any:
        """Its CLIP with random weights; a small trunk borrows the name of the one whose last widths it has."""
        vision, text = config.vision, config.text
        name = "convnext_large" if vision.dims[2] == 768 else "convnext_base"
        small = types.SimpleNamespace(create_model=_timm_with(depths=vision.depths, dims=vision.dims))
        with _attribute(self.timm_module, "timm", small):
            clip = self.clip_module.CLIP(
                embed_dim=config.embed_dim,
                vision_cfg={"timm_model_name": name, "timm_pool": "", "timm_proj": vision.head, "image_size": 320},
                text_cfg={
                    "context_length": text.context_length,
                    "vocab_size": text.vocab_size,
                    "width": text.width,
                    "heads": text.heads,
                    "layers": text.layers,
                },
            )
        return without_drop_path(clip)

    def model(self, clip: Any, decoder: Any, words: list[str], prompt: str, size: tuple[int, int]) -> Any:
        """Its ERRSeg, whole: towers and decoder in its head, which knows these words and squeezes images to `size`."""
        made = _head_class(self.root)
        head = made.__new__(made)
        nn.Module.__init__(head)  # its own wants class files and downloads weights
        head.clip_model, head.decoder, head.tokenizer = clip, decoder, self.tokenizer_module.tokenize
        head.class_texts = head.test_class_texts = words
        head.prompt_templates, head.tokens, head.cache = [prompt], None, None
        return self.meta_architecture.ERRSeg(
            sem_seg_head=head,
            size_divisibility=-1,
            clip_pixel_mean=MEAN,
            clip_pixel_std=STD,
            crop_size=size,
            clip_finetune="weight",
            in_features=(),
            ignore_value=255,
        )

    def forward(self, model: Any, inputs: list[dict[str, Any]]) -> Any:
        """The forward pass of its ERRSeg on an object that has what it reads."""
        return self.meta_architecture.ERRSeg.forward(model, inputs)


def without_drop_path(module: Any) -> Any:
    """Switch drop path off, in training too."""
    for part in module.modules():
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.0
    return module


def load_official(checkout: Path) -> OfficialCode:
    """Import what is compared; raises ErrSegError for a folder that lacks it or does not import."""
    for part in (MODULES / "decoder.py", META_ARCHITECTURE, OPEN_CLIP / "model.py", OPEN_CLIP / "tokenizer.py"):
        if not (checkout / part).is_file():
            raise ErrSegError(f"{checkout} is no checkout of the published ERR-Seg code: it has no {part}")
    for name in [name for name in sys.modules if name.startswith(_PREFIX)]:
        del sys.modules[name]
    _package("decoder", checkout / MODULES)
    _package("clip", checkout / OPEN_CLIP)
    _package("model", (checkout / META_ARCHITECTURE).parent)
    try:
        with _silence(), _old_timm_names(), _detectron2():
            return OfficialCode(
                decoder_module=importlib.import_module(f"{_PREFIX}_decoder.decoder"),
                clip_module=importlib.import_module(f"{_PREFIX}_clip.model"),
                timm_module=importlib.import_module(f"{_PREFIX}_clip.timm_model"),
                tokenizer_module=importlib.import_module(f"{_PREFIX}_clip.tokenizer"),
                meta_architecture=importlib.import_module(f"{_PREFIX}_model.err_seg_model"),
                root=checkout,
            )
    except ImportError as error:
        raise ErrSegError(f"the published code in {checkout} does not import: {error}") from error


def _head_class(checkout: Path) -> Any:
    """Its ERRSEGHead, over modules of its own."""
    name = f"{_PREFIX}_modeling"
    if name not in sys.modules:
        _package("modeling", checkout / MODELING)
    others: dict[str, dict[str, Any]] = {
        "fvcore": {},
        "fvcore.nn": {},
        "fvcore.nn.weight_init": {},
        "open_clip": {},
        "err_seg": {},
        "err_seg.third_party": {"imagenet_templates": None},
    }
    try:
        with _silence(), _old_timm_names(), _detectron2(), _only(others):
            return importlib.import_module(f"{name}.heads.err_seg_head").ERRSEGHead
    except ImportError as error:
        raise ErrSegError(f"the published code in {checkout} does not import: {error}") from error


def _package(name: str, folder: Path) -> None:
    """A package whose own __init__ is not run: the published ones import detectron2 and data sets."""
    package = types.ModuleType(f"{_PREFIX}_{name}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _stand_ins(modules: dict[str, Any]) -> Iterator[None]:
    absent = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def _old_timm_names() -> Iterator[None]:
    """timm.models.layers under its present name, once timm has dropped the old one."""
    import timm.layers

    try:
        importlib.import_module("timm.models.layers")
    except ImportError:
        with _stand_ins({"timm.models.layers": timm.layers}):
            yield
    else:
        yield


class _Registry:
    def register(self) -> Any:
        return lambda registered: registered


class _Images:
    """Pictures of one size, stacked."""

    def __init__(self, images: list[Tensor]) -> None:
        self.tensor = torch.stack(images)

    @staticmethod
    def from_tensors(images: list[Tensor], size_divisibility: int) -> _Images:
        return _Images(images)


def _postprocess(result: Tensor, image_size: tuple[int, int], height: int, width: int) -> Tensor:
    """What detectron2 does with a semantic map: cut off the padding, bilinear to the picture's own size."""
    result = result[:, : image_size[0], : image_size[1]]
    return F.interpolate(result[None], size=(height, width), mode="bilinear", align_corners=False)[0]


@contextlib.contextmanager
def _detectron2() -> Iterator[None]:
    """The few names of detectron2 that the published model imports, where detectron2 is not installed."""
    names: dict[str, dict[str, Any]] = {
        "detectron2": {},
        "detectron2.config": {"configurable": lambda function: function},
        "detectron2.data": {"MetadataCatalog": None},
        "detectron2.layers": {"Conv2d": None, "ShapeSpec": None, "get_norm": None},
        "detectron2.modeling": {
            "META_ARCH_REGISTRY": _Registry(),
            "build_backbone": None,
            "build_sem_seg_head": None,
            "SEM_SEG_HEADS_REGISTRY": _Registry(),
        },
        "detectron2.modeling.backbone": {"Backbone": nn.Module},
        "detectron2.modeling.postprocessing": {"sem_seg_postprocess": _postprocess},
        "detectron2.structures": {"ImageList": _Images},
        "detectron2.utils": {},
        "detectron2.utils.memory": {"_ignore_torch_cuda_oom": None},
    }
    # Always these, installed or not: the registry of an installed one would refuse a second model of that name.
    with _only(names):
        yield


@contextlib.contextmanager
def _only(names: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Modules with nothing but these members, instead of any that are there."""
    modules = {}
    for name, members in names.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(members, __path__=[])
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        with _stand_ins(modules):
            yield
    finally:
        sys.modules.update(before)


def _timm_with(**sizes: Any) -> Any:
    import timm

    return lambda name, **options: timm.create_model(name, **(options | sizes))


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
