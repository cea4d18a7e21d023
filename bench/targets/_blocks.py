"""One layer of RRCA in halves: published modules and this package's with the same random weights."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange, repeat
from torch import Tensor, nn

from errseg.bench.cases import Case
from errseg.bench.registry import Inputs
from errseg.bench.targets import _networks as networks
from errseg.model.decoder import published_name
from errseg.model.rrca import RRCALayer
from errseg.testing.inputs import random_tensor
from errseg.testing.published_decoder import AggregatorLayer

Weights = Callable[[nn.Module], dict[str, Tensor]]


def layer(case: Case) -> RRCALayer:
    """The first layer."""
    found = networks.decoder(case).rrca.layers[0]
    assert isinstance(found, RRCALayer)
    return found


def published_layer(case: Case) -> AggregatorLayer:
    """The first layer in the published order of operations."""
    found = networks.published_decoder(case).aggregator_layers[0]
    assert isinstance(found, AggregatorLayer)
    return found


def own_weights(half: str) -> Weights:
    """Parameters of one half ("spatial" or "classes") of a layer, by published name."""
    prefix = f"rrca.layers.0.{half}."
    return lambda module: {published_name(prefix + name): value for name, value in module.named_parameters()}


def published_weights(half: str) -> Weights:
    """The same of a published layer ("spatial_fusion" or "class_fusion")."""
    return lambda module: {
        f"aggregator_layers.0.{name}": value for name, value in module.named_parameters() if name.startswith(half)
    }


def inputs(case: Case, seed: int) -> Inputs:
    """Tokens [B, K, H, W, C], guidance [B, H, W, C], text guidance [B, K, C]."""
    side, width = case.os16, case.decoder.width
    shapes = (case.batch, case.kept, side, side, width), (case.batch, side, side, width), (case.batch, case.kept, width)
    return tuple(random_tensor(*shape, seed=seed + i) for i, shape in enumerate(shapes))


def to_maps(x: Tensor) -> Tensor:
    """[B, K, H, W, C] -> [B K, C, H, W], as the published code keeps them."""
    return rearrange(x, "b k h w c -> (b k) c h w").contiguous()


def to_tokens(case: Case) -> Callable[[Tensor], Tensor]:
    """[B K, C, h, w] -> [B, K, h, w, C]."""
    return lambda maps: rearrange(maps, "(b k) c h w -> b k h w c", b=case.batch)


def repeated(guidance: Tensor, num_classes: int) -> Tensor:
    """[B, C, H, W] -> [B K, H W, C], the published copy for every class."""
    return repeat(guidance, "b c h w -> (b k) (h w) c", k=num_classes)
