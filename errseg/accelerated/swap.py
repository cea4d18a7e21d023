"""`accelerate` and `restore`: find the published modules in a model and put the fused classes in front of theirs."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import nn

from errseg.accelerated.decoder import FusedDecoder, FusedYardstick
from errseg.accelerated.fused import Fused, fuse, published_class, unfuse
from errseg.accelerated.head import FusedHead, TextState
from errseg.accelerated.model import FusedModel
from errseg.accelerated.view import decoder_view
from errseg.errors import ErrSegError

Model = TypeVar("Model", bound=nn.Module)

_FIRST_KEY = "corr_proj_convs.0.0.weight"
# What the forward pass of a published module takes, and what else must be there for it to be one.
_DECODERS: dict[tuple[str, ...], type[Fused]] = {
    ("img_feats", "text_feats", "img_guidances", "gt_classes"): FusedDecoder,
    ("features", "text_embeddings", "num_selected", "class_ids", "required"): FusedYardstick,
}
_HEAD = ("img_features", "proj_features", "img_gudiances", "gt_classes")
_HEAD_HAS = ("clip_model", "tokenizer", "prompt_templates", "class_texts", "test_class_texts")
_MODEL = ("batched_inputs",)
_MODEL_HAS = ("clip_pixel_mean", "clip_pixel_std", "clip_resolution", "size_divisibility", "ignore_value")


def accelerate(model: Model) -> Model:
    """Give a model of the published code base this project's fused forward and loss, in place.

    What is fused: the decoder; with its head, the text tower too (prompts cut to their length, cached per vocabulary in
    evaluation); with the meta-architecture, the loss and the label scores too, over the K selected classes alone. Class
    names, signatures and results stay, those of modules inside the decoder are no longer asked: hooks on its blocks and
    layers do not run. All parameters remain the very same objects under the same names, and nothing derived from them
    outlives a call, so optimizers, checkpoints, `.to()`, `load_state_dict`, freezing, autocast, gradient scaling,
    DistributedDataParallel, `torch.compile`, copying and pickling work as before, whichever comes first.

    Classes are selected by the rule of :func:`errseg.ops.select_classes`; where votes tie, the published code leaves
    the choice to chance. Scores of classes that were not selected are exactly 0. An evaluation of several images
    answers for each of them.

    Args:
        model: the meta-architecture, its head, its decoder, a wrapper around one of them
            (DistributedDataParallel), or an :class:`errseg.testing.PublishedDecoder`.

    Returns:
        `model` itself. A model that is accelerated already is looked through again, which is harmless, and needed after
        a layer of its decoder has been replaced by another.

    Raises:
        ErrSegError: for any other module, naming the first parameter or setting that differs; it is left unchanged.
    """
    changes: list[tuple[nn.Module, type[Fused], Any]] = []
    for name in _decoders(model):
        changes += _changes(model, name)
    for module, stand_in, state in changes:
        fuse(module, stand_in, state)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place: the model computes as published again, with its parameters of now.

    Raises:
        ErrSegError: when nothing in it is accelerated.
    """
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    if not fused:
        raise ErrSegError(f"errseg.restore: this {type(model).__name__} is not accelerated")
    for module in fused:
        unfuse(module)
    return model


def _decoders(model: nn.Module) -> list[str]:
    """Names of the published decoders in it; "" is the model itself."""
    if not isinstance(model, nn.Module):
        raise ErrSegError(f"errseg.accelerate takes a model of the published code, not a {type(model).__name__}")
    names = [key.removesuffix(_FIRST_KEY) for key in model.state_dict() if f".{key}".endswith(f".{_FIRST_KEY}")]
    if not names:
        raise ErrSegError(
            f"errseg.accelerate takes a model of the published code: this {type(model).__name__} has no {_FIRST_KEY}"
        )
    return [name.removesuffix(".") for name in names]


def _changes(model: nn.Module, name: str) -> list[tuple[nn.Module, type[Fused], Any]]:
    """The decoder of this name and, where they are the published ones, the head and the model around it."""
    decoder = model.get_submodule(name)
    stand_in = _DECODERS.get(_arguments(decoder))
    if stand_in is None:
        raise ErrSegError(
            f"errseg.accelerate: {type(decoder).__name__}.forward takes {', '.join(_arguments(decoder))},"
            f" expected {', '.join(next(iter(_DECODERS)))}"
        )
    try:
        changes: list[tuple[nn.Module, type[Fused], Any]] = [(decoder, stand_in, decoder_view(decoder))]
    except ErrSegError as error:
        raise ErrSegError(f"errseg.accelerate: {error}") from error
    head = _around(model, name, "decoder")
    if stand_in is FusedDecoder and _is(head, _HEAD, _HEAD_HAS) and len(head.prompt_templates) == 1:
        changes.append((head, FusedHead, TextState()))
        whole = _around(model, name, "sem_seg_head.decoder")
        if _is(whole, _MODEL, _MODEL_HAS):
            changes.append((whole, FusedModel, None))
    for module, _, _ in changes:
        if "forward" in vars(module):
            raise ErrSegError(f"errseg.accelerate: the forward of this {type(module).__name__} object was replaced")
    return changes


def _around(model: nn.Module, name: str, inner: str) -> Any:
    """The module in which the decoder of this name is called `inner`, None when there is none."""
    if not f".{name}".endswith(f".{inner}"):
        return None
    return model.get_submodule(name.removesuffix(inner).removesuffix("."))


def _is(module: Any, arguments: tuple[str, ...], attributes: tuple[str, ...]) -> bool:
    return module is not None and _arguments(module) == arguments and all(hasattr(module, a) for a in attributes)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of what the published forward pass takes."""
    return tuple(inspect.signature(published_class(module).forward).parameters)[1:]
