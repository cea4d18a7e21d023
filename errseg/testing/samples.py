"""One sample call per op: arguments for the public function, for tests, benchmarks and verification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from errseg import ops


class Sample(NamedTuple):
    """Arguments of one call, ``function(*args, **kwargs)``."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, *, backend: str | None = None) -> Any:
        """Run the op on its arguments."""
        return self.function(*self.args, **self.kwargs, backend=backend)

    def map(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same call with every tensor replaced."""
        return Sample(self.function, map_tensors(self.args, change), map_tensors(self.kwargs, change))

    def to(self, dtype: torch.dtype) -> Sample:
        """The same call with floating tensors in another dtype."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def leaves(self) -> list[Tensor]:
        """The floating tensors of the call, in a fixed order."""
        found: list[Tensor] = []
        self.map(lambda t: found.append(t) or t if t.is_floating_point() else t)  # type: ignore[func-returns-value]
        return found

    def with_leaves(self, leaves: Iterator[Tensor]) -> Sample:
        """The same call with its floating tensors taken from ``leaves``."""
        return self.map(lambda t: next(leaves) if t.is_floating_point() else t)

    def raw_arguments(self) -> tuple[Any, ...]:
        """The arguments that reach the dispatcher op: folded, without the backend."""
        op = ops.OPS[self.function.__name__]
        seen: list[tuple[Any, ...]] = []

        def record(backend: str | None, *args: Any) -> str:
            seen.append(args)
            return "reference"

        with patch.object(op, "choose", record):
            self()
        return seen[0]


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in tuples, lists, dicts and dataclasses replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [map_tensors(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(v, change) for v in value]
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a sample: small, odd, no multiple of a tile."""

    batch: int = 2
    classes: int = 5  # K
    words: int = 11  # T
    height: int = 7  # H at 1/16
    width: int = 9  # W at 1/16
    channels: int = 16  # C
    heads: int = 2
    hidden: int = 24  # MLP
    embed: int = 12  # 7x7 convolutions
    text: int = 10  # D


def sample(op: str, sizes: Sizes | None = None, *, seed: int = 0, drop_path: bool = False) -> Sample:
    """A random float64 call of ``op`` whose values bfloat16 holds exactly; ``to`` gives other dtypes."""
    return _SAMPLES[op](_Draw(seed), sizes or Sizes(), drop_path)


class _Draw:
    """Seeded numbers on the bfloat16 grid."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + mean
        return values.bfloat16().double()

    def linear(self, out: int, *rest: int) -> Tensor:
        """A weight whose products have about unit variance."""
        fan_in = 1
        for size in rest:
            fan_in *= size
        return self(out, *rest, scale=fan_in**-0.5)

    def norm(self, channels: int) -> tuple[Tensor, Tensor]:
        return self(channels, scale=0.3, mean=1.0), self(channels, scale=0.3)

    def ids(self, batch: int, count: int, words: int) -> Tensor:
        order = torch.rand((batch, words), generator=self.generator).argsort(1)
        return order[:, :count].sort(1).values

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def mask(self, *shape: int) -> Tensor:
        """Drop path at rate 1/2: entries 0 or 2."""
        return 2.0 * self.integers(2, *shape).double()


def _class_votes(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    return Sample(ops.class_votes, (draw(s.batch, s.text, s.height, s.width), draw(s.words, s.text)), {})


def _select_classes(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    votes = draw.integers(4, s.batch, s.words) * 10
    return Sample(ops.select_classes, (votes, s.classes), {"required": draw.integers(4, s.batch, s.words) == 0})


def _cost_volume(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    images, text = draw(s.batch, s.text, s.height, s.width), draw(s.words, s.text)
    return Sample(ops.cost_volume, (images, text, draw.ids(s.batch, s.classes, s.words)), {})


def _cost_embedding(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    costs = draw(s.batch, s.classes, s.height, s.width), draw(s.batch, s.classes, s.height // 2, s.width // 2)
    params = ops.CostEmbeddingParams(
        draw.linear(s.embed, 1, 7, 7),
        draw(s.embed),
        draw.linear(s.embed, 1, 7, 7),
        draw(s.embed),
        draw.linear(s.channels, s.embed, 1, 1),
        draw(s.channels),
    )
    return Sample(ops.cost_embedding, (*costs, params), {})


def _mlp_params(draw: _Draw, s: Sizes) -> ops.GatedMLPParams:
    c, m = s.channels, s.hidden
    first = draw.linear(m, c), draw(m), draw.linear(m, c), draw(m)
    return ops.GatedMLPParams(*draw.norm(c), *first, draw.linear(c, m), draw(c))


def _tokens(draw: _Draw, s: Sizes) -> Tensor:
    return draw(s.batch, s.classes, s.height, s.width, s.channels)


def _gated_mlp(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    return Sample(ops.gated_mlp, (_tokens(draw, s), _mlp_params(draw, s)), {})


def _depthwise_conv(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    args = _tokens(draw, s), draw.linear(s.channels, 1, 7, 7), draw(s.channels), _tokens(draw, s)
    return Sample(ops.depthwise_conv, (*args, draw.mask(s.batch, s.classes) if drop_path else None), {})


def _spatial_attention(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    c = s.channels
    params = ops.SpatialAttentionParams(
        *draw.norm(c),
        *(draw.linear(c, 2 * c), draw(c)),
        *(draw.linear(2 * c, 2 * c, 2, 2), draw(2 * c)),
        *draw.norm(2 * c),
        *(draw.linear(c, 2 * c), draw(c)),
        *(draw.linear(c, c, 2, 2), draw(c)),
        *draw.norm(c),
        *(draw.linear(c, c), draw(c)),
        *(draw.linear(c, c), draw(c)),
    )
    mask = draw.mask(s.batch, s.classes) if drop_path else None
    args = _tokens(draw, s), draw(s.batch, s.height, s.width, c), params
    return Sample(ops.spatial_attention, args, {"num_heads": s.heads, "drop_path": mask})


def _class_attention(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    c = s.channels
    params = ops.ClassAttentionParams(
        *draw.norm(c),
        *(draw.linear(c, 2 * c), draw(c)),
        *(draw.linear(c, 2 * c), draw(c)),
        *(draw.linear(c, c), draw(c)),
        *(draw.linear(c, c), draw(c)),
        mlp=_mlp_params(draw, s),
    )
    shape = s.batch, s.height // 2, s.width // 2
    masks = (draw.mask(*shape), draw.mask(*shape)) if drop_path else None
    args = _tokens(draw, s), draw(s.batch, s.classes, c), params
    return Sample(ops.class_attention, args, {"num_heads": s.heads, "drop_path": masks})


def _upsample_residual(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    low = draw(s.batch, s.classes, max(1, s.height // 2), max(1, s.width // 2), s.channels)
    return Sample(ops.upsample_residual, (low, _tokens(draw, s)), {})


def _up_step(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    """A step that doubles the size, to about half the channels; see `of_same_size`."""
    c, guides = 8 * max(1, s.channels // 16), 5
    params = ops.UpStepParams(
        *(draw.linear(s.channels, c, 2, 2), draw(c)),
        *(draw.linear(c, c + guides, 3, 3), *draw.norm(c)),
        *(draw.linear(c, c, 3, 3), *draw.norm(c)),
    )
    return Sample(ops.up_step, (_tokens(draw, s), draw(s.batch, guides, 2 * s.height, 2 * s.width), params), {})


def of_same_size(up_step: Sample) -> Sample:
    """A call of `up_step` made one whose step is a 1x1 convolution."""
    x, guidance, params = up_step.args
    up_weight = params.up_weight[:, :, :1, :1].transpose(0, 1)
    params = dataclasses.replace(params, up_weight=up_weight)
    return Sample(up_step.function, (x, guidance[..., : x.shape[2], : x.shape[3]], params), up_step.kwargs)


def _upsample_argmax(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    logits = draw(s.batch, s.classes, s.height, s.width, scale=3.0)
    size = 3 * s.height + 1, 4 * s.width - 1
    return Sample(ops.upsample_argmax, (logits, draw.ids(s.batch, s.classes, s.words), size), {"return_scores": True})


def _upsample_bce(draw: _Draw, s: Sizes, drop_path: bool) -> Sample:
    logits = draw(s.batch, s.classes, s.height, s.width, scale=3.0)
    target = draw.integers(s.words + 1, s.batch, 3 * s.height + 1, 4 * s.width - 1)
    target = target.where(target < s.words, 255)
    kwargs = {"vocabulary_size": s.words, "ignore_index": 255}
    return Sample(ops.upsample_bce, (logits, draw.ids(s.batch, s.classes, s.words), target), kwargs)


_SAMPLES: dict[str, Callable[[_Draw, Sizes, bool], Sample]] = {
    "class_votes": _class_votes,
    "select_classes": _select_classes,
    "cost_volume": _cost_volume,
    "cost_embedding": _cost_embedding,
    "gated_mlp": _gated_mlp,
    "depthwise_conv": _depthwise_conv,
    "spatial_attention": _spatial_attention,
    "class_attention": _class_attention,
    "upsample_residual": _upsample_residual,
    "up_step": _up_step,
    "upsample_argmax": _upsample_argmax,
    "upsample_bce": _upsample_bce,
}
