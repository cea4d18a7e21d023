"""This project's Decoder over the layers of a published one: the very same layer objects in another tree.

Nothing is copied or folded ahead of time, so whatever happens to a layer or its parameters is seen by the next call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from errseg.errors import ErrSegError
from errseg.model.decoder import Decoder, published_name
from errseg.model.published import check_state_dict, decoder_config
from errseg.model.rrca import DropPath, RRCALayer


class Place(NamedTuple):
    """Where a module was found: its published name, and its entry among the children of its parent."""

    name: str
    siblings: dict[str, nn.Module | None]
    key: str
    module: nn.Module


@dataclass(frozen=True)
class DecoderView:
    """A decoder built of published layers, and all the places between the published decoder and them."""

    decoder: Decoder
    places: tuple[Place, ...]

    def current(self) -> Decoder:
        """The decoder, once it is sure that nothing was replaced; ErrSegError names what was."""
        for name, siblings, key, module in self.places:
            if siblings.get(key) is not module:
                raise ErrSegError(f"{name} is another module since errseg.accelerate: call errseg.accelerate again")
        return self.decoder


def decoder_view(published: nn.Module) -> DecoderView:
    """View a decoder of the published structure; raises ErrSegError naming the first thing that differs."""
    weights = published.state_dict()
    with torch.device("meta"):
        decoder = Decoder(decoder_config(weights))
    check_state_dict(weights, decoder.published_state_dict(), f"this {type(published).__name__}")
    for name, layer in list(decoder.named_modules()):
        if next(layer.children(), None) is None:
            name_there = published_name(f"{name}.").removesuffix(".")
            found = published.get_submodule(name_there)
            _check_layer(name_there, found, layer)
            decoder.set_submodule(name, found)
    _take_heads(decoder, published)
    _check_no_dropout(published)
    return DecoderView(decoder, tuple(_places(published)))


def _places(published: nn.Module) -> Iterator[Place]:
    for name, parent in published.named_modules():
        for key, child in parent.named_children():
            yield Place(f"{name}.{key}".lstrip("."), parent._modules, key, child)


def _check_layer(name: str, found: nn.Module, expected: nn.Module) -> None:
    """Same kind and settings (strides, groups, epsilons), which shapes alone do not tell."""
    if isinstance(expected, DropPath):
        same = hasattr(found, "drop_prob") or isinstance(found, nn.Identity)
    else:
        same = repr(found) == repr(expected)
    if not same:
        raise ErrSegError(f"{name} is {' '.join(repr(found).split())}, expected {expected!r}")


def _take_heads(decoder: Decoder, published: nn.Module) -> None:
    """The number of attention heads, which no tensor tells, and the rest that attention may have."""
    for index, layer in enumerate(decoder.rrca.layers):
        assert isinstance(layer, RRCALayer)
        for block, name in ((layer.spatial, "spatial_fusion"), (layer.classes, "class_fusion")):
            name = f"aggregator_layers.{index}.{name}.sa.attention"
            attention = published.get_submodule(name)
            block.num_heads = int(getattr(attention, "num_heads", block.num_heads))
            if isinstance(drop := getattr(attention, "attn_drop", 0.0), float) and drop > 0:
                raise ErrSegError(f"{name} has attn_drop {drop:g}, expected 0")


def _check_no_dropout(published: nn.Module) -> None:
    for name, module in published.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ErrSegError(f"{name} drops with p {module.p:g}, expected 0")
