"""The grid: for every op small shapes that break kernels, and the sizes of the published models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from errseg.testing.samples import Sample, Sizes, map_tensors, of_same_size, sample

WITH_DROP_PATH = ("depthwise_conv", "spatial_attention", "class_attention")
WITH_CHANNELS = ("cost_embedding", "gated_mlp", "upsample_residual", "up_step", *WITH_DROP_PATH)
WINDOWED = ("cost_embedding", "spatial_attention", "class_attention")  # need 2 x 2 pixels
BATCHED = {  # arguments whose first axis is the batch
    "class_votes": ("image_embeddings",),
    "select_classes": ("votes", "required"),
    "cost_volume": ("image_embeddings", "class_ids"),
    "cost_embedding": ("cost16", "cost32"),
    "gated_mlp": ("x",),
    "depthwise_conv": ("x", "residual", "drop_path"),
    "spatial_attention": ("x", "guidance", "drop_path"),
    "class_attention": ("x", "text_guidance", "drop_path"),
    "upsample_residual": ("x", "residual"),
    "up_step": ("x", "guidance"),
    "upsample_argmax": ("logits", "class_ids"),
    "upsample_bce": ("logits", "class_ids", "target"),
}
PUBLISHED_MAPS = {"B": (40, 640), "L": (48, 768)}  # size at 1/16 and D
PUBLISHED_K = (16, 24, 32, 48)
PUBLISHED_T = (20, 59, 150, 459, 847, 100_000)
ATTENDED_K = (1, 2, 7, 16, 24, 32, 48, 64, 65, 171, 847)  # attention among the classes: about every border of a tile
LABEL_MAPS = ((480, 640), (512, 683))
CROP = 640  # targets in training are square


@dataclass(frozen=True)
class Case:
    """One call of an op: its sizes, what is special about it, and how its tensors lie in memory."""

    op: str
    name: str
    sizes: Sizes
    change: Callable[[Sample], Sample] | None = None
    view: str | None = None  # "strided", "transposed" or "expanded"
    drop_path: bool = False
    real: bool = False  # a size of the published models, left out of the quick run
    narrow: bool = False  # an interpreter gets through in every dtype; left out of the quick run too
    slow_half: bool = False  # minutes in float16 on a CPU, where PyTorch multiplies number by number
    draws: int = 1  # scalars are compared over several draws
    gigabytes: float = 0.0  # of the largest of the runs that the case needs
    published_gigabytes: float = 0.0  # of the run in the published order

    def call(self, draw: int = 0) -> Sample:
        """The call in float64, on the CPU; float16 and bfloat16 hold its values exactly."""
        made = sample(self.op, self.sizes, seed=draw, drop_path=self.drop_path)
        made = self.change(made) if self.change else made
        return made.to(torch.float16).to(torch.float64)

    def arrange(self, call: Sample) -> Sample:
        """The same values (the first image's, when expanded) as views of other memory; differentiable."""
        if self.view is None:
            return call
        if self.view == "expanded":
            return _map_arguments(call, BATCHED[self.op], lambda t: t[:1].expand(t.shape))
        return call.map(_strided if self.view == "strided" else _transposed)


def _strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2] if t.ndim else t


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t


def argument_names(call: Sample) -> list[str]:
    """The names under which a call passes its positional arguments."""
    import inspect

    return list(inspect.signature(call.function).parameters)[: len(call.args)]


def _map_arguments(call: Sample, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Sample:
    args = tuple(
        map_tensors(value, change) if name in names else value
        for name, value in zip(argument_names(call), call.args, strict=True)
    )
    kwargs = {name: map_tensors(value, change) if name in names else value for name, value in call.kwargs.items()}
    return Sample(call.function, args, kwargs)


def _with_argument(position: int, change: Callable[[Any], Any]) -> Callable[[Sample], Sample]:
    def changed(call: Sample) -> Sample:
        args = list(call.args)
        args[position] = change(args[position])
        return Sample(call.function, tuple(args), call.kwargs)

    return changed


def _with_options(**options: Any) -> Callable[[Sample], Sample]:
    return lambda call: Sample(call.function, call.args, call.kwargs | options)


def cases(op: str, *, quick: bool) -> list[Case]:
    """The grid of one op: small shapes, and unless `quick` the real sizes."""
    return _small(op) + ([] if quick else _real(op))


# ---- small shapes (style: odd sizes, views, few words, one class, all ignored, empty batch, one pixel)


def _small(op: str) -> list[Case]:
    wide = {"channels": 128, "heads": 4, "hidden": 384, "embed": 32, "text": 64}  # heads of 32, as published
    pixel = {"height": 2, "width": 2} if op in WINDOWED else {"height": 1, "width": 1}
    odd, published = Sizes(), Sizes(classes=6, words=13, height=5, width=7, **wide)
    grid = [
        Case(op, "odd sizes", odd),
        Case(op, "published channels", published),
        Case(op, "one class", replace(published, batch=1, classes=1, words=1)),
        Case(op, "one pixel", replace(published, **pixel)),
        Case(op, "empty batch", replace(odd, batch=0)),
        Case(op, "past a tile", Sizes(batch=1, classes=17, words=67, height=5, width=13, **wide)),
        *(Case(op, f"{view} views", published, view=view) for view in ("strided", "transposed", "expanded")),
    ]
    if op in WITH_DROP_PATH:
        grid.append(Case(op, "drop path", published, drop_path=True))
        views = ("strided", "transposed")
        grid += [Case(op, f"{view} views, drop path", odd, view=view, drop_path=True) for view in views]
    grid += _SPECIAL.get(op, list)()
    if op == "upsample_bce":
        grid = [replace(case, draws=4) for case in grid]
    return grid


def _special_votes() -> list[Case]:
    few = [Case("class_votes", f"{t} words", Sizes(words=t, text=64)) for t in (1, 2, 3)]
    tiles = [Case("class_votes", f"{t} words", Sizes(words=t, text=40)) for t in (63, 64, 65, 129, 300)]
    return [
        *few,
        *tiles,
        Case("class_votes", "every word three times", Sizes(words=50, text=32), _with_argument(1, _three_times)),
        Case("class_votes", "zero words, zero pixels", Sizes(words=20, text=32), _zeroed),
    ]


def _three_times(words: Tensor) -> Tensor:
    return words.repeat(3, 1)


def _zeroed(call: Sample) -> Sample:
    images, words = (t.clone() for t in call.args)
    images[:, :, 0] = 0
    words[::3] = 0
    return Sample(call.function, (images, words), call.kwargs)


def _special_selection() -> list[Case]:
    return [
        Case("select_classes", "T < K", Sizes(words=3, classes=5)),
        Case("select_classes", "no ground truth", Sizes(words=40, classes=16), _with_options(required=None)),
        Case("select_classes", "all required", Sizes(words=9), lambda c: _map_arguments(c, ("required",), _all_true)),
        Case("select_classes", "no votes", Sizes(words=50, classes=16), _with_argument(0, torch.zeros_like)),
    ]


def _all_true(mask: Tensor) -> Tensor:
    return torch.ones_like(mask)


def _special_costs() -> list[Case]:
    return [
        Case("cost_volume", "all words", Sizes(words=7, text=64), _with_argument(2, lambda ids: _all_ids(ids, 7))),
        Case("cost_volume", "T = K", Sizes(words=5, text=64)),
    ]


def _all_ids(ids: Tensor, words: int) -> Tensor:
    return torch.arange(words).expand(len(ids), words)


def _special_embedding() -> list[Case]:
    sizes = Sizes(height=11, width=10, channels=128, embed=32)
    return [
        Case("cost_embedding", "odd low map", replace(sizes, width=6)),
        Case("cost_embedding", "low map not half", sizes, _with_argument(1, lambda cost: cost[..., :3])),
    ]


def _special_conv() -> list[Case]:
    return [
        Case("depthwise_conv", "no bias, no residual", Sizes(), _without_options),
        Case("depthwise_conv", "3x3", Sizes(channels=128), _with_argument(1, lambda w: w[..., 2:5, 2:5].contiguous())),
        Case("depthwise_conv", "wider than the map", Sizes(height=2, width=3, channels=128)),
        Case("depthwise_conv", "odd channels", Sizes(channels=35)),
        Case("depthwise_conv", "tails", Sizes(batch=1, height=19, width=53, channels=136), drop_path=True),
    ]


def _without_options(call: Sample) -> Sample:
    x, weight, *_ = call.args
    return Sample(call.function, (x, weight, None, None, None), call.kwargs)


def _special_residual() -> list[Case]:
    op = "upsample_residual"
    return [
        Case(op, "grown from a single one", Sizes(height=3, width=2)),
        Case(op, "to one row", Sizes(height=1, width=7), _with_argument(0, lambda x: torch.cat((x, x), 2))),
        Case(op, "shrinking", Sizes(), _with_argument(1, lambda r: r[:, :, :2, :3].contiguous())),
        Case(op, "odd channels", Sizes(channels=35)),
        Case(op, "the same size", Sizes(), lambda c: Sample(c.function, (c.args[1], c.args[1].clone()), c.kwargs)),
    ]


def _special_up_step() -> list[Case]:
    op = "up_step"
    return [
        Case(op, "the same size", Sizes(), of_same_size),
        Case(op, "a 1x1 map of the same size", Sizes(height=1, width=1), of_same_size),
        Case(op, "one row", Sizes(height=1, width=11)),
        Case(op, "odd channels", Sizes(channels=35)),
        Case(op, "several tiles", Sizes(batch=1, classes=2, height=9, width=17, channels=32)),
    ]


def _special_argmax() -> list[Case]:
    op = "upsample_argmax"
    return [
        Case(op, "equal classes", Sizes(classes=12, words=40), _with_argument(0, _repeated_maps)),
        Case(op, "saturated", Sizes(classes=6), _with_argument(0, lambda x: (10 * x).bfloat16().double())),
        Case(op, "ids in disorder", Sizes(classes=9, words=30), _reversed_ids),
        Case(op, "very negative", Sizes(), _with_argument(0, lambda x: torch.full_like(x, -200.0))),
        Case(op, "shrinking", Sizes(height=20, width=30), _with_argument(2, lambda size: (7, 11))),
        Case(op, "one output pixel", Sizes(), _with_argument(2, lambda size: (1, 1))),
        Case(op, "48 classes", Sizes(batch=1, classes=48, words=847, height=10, width=12)),
    ]


def _repeated_maps(logits: Tensor) -> Tensor:
    """Every map four times, so that every pixel is a tie between equal maps."""
    return logits[:, ::4].repeat(1, 4, 1, 1)


def _reversed_ids(call: Sample) -> Sample:
    logits, ids, size = call.args
    return Sample(call.function, (_repeated_maps(logits[:, :8]), ids[:, :8].flip(1).contiguous(), size), call.kwargs)


def _special_loss() -> list[Case]:
    op = "upsample_bce"
    return [
        Case(op, "all ignored", Sizes(), _with_argument(2, lambda t: torch.full_like(t, 255))),
        Case(op, "ignored left out", Sizes(), _with_options(exclude_ignored=True)),
        Case(
            op,
            "all ignored left out",
            Sizes(),
            lambda c: _with_options(exclude_ignored=True)(_with_argument(2, lambda t: torch.full_like(t, 255))(c)),
        ),
        Case(op, "uint8 targets", Sizes(), _with_argument(2, lambda t: t.to(torch.uint8))),
        Case(op, "T = K", Sizes(classes=11)),
        Case(op, "nothing selected is there", Sizes(classes=3), _missed),
        Case(op, "shrinking", Sizes(height=20, width=30), _with_argument(2, lambda t: t[:, :9, :13].contiguous())),
    ]


def _missed(call: Sample) -> Sample:
    logits, ids, target = call.args
    absent = next(word for word in range(11) if not (ids == word).any())
    return Sample(call.function, (logits, ids, torch.full_like(target, absent)), call.kwargs)


_SPECIAL: dict[str, Callable[[], list[Case]]] = {
    "class_votes": _special_votes,
    "select_classes": _special_selection,
    "cost_volume": _special_costs,
    "cost_embedding": _special_embedding,
    "depthwise_conv": _special_conv,
    "upsample_residual": _special_residual,
    "up_step": _special_up_step,
    "upsample_argmax": _special_argmax,
    "upsample_bce": _special_loss,
}


# ---- real sizes


def _real(op: str) -> list[Case]:
    cases = [case for model, (side, dim) in PUBLISHED_MAPS.items() for case in _of_model(op, model, side, dim)]
    if op in ("class_votes", "select_classes"):
        million = Sizes(batch=1, classes=48, words=1_000_000, height=10, width=10, text=64)
        own, published = _gigabytes(op, million, None)
        cases.append(Case(op, "1,000,000 words", million, real=True, gigabytes=own, published_gigabytes=published))
    if op == "class_attention":
        narrow = Sizes(batch=1, height=3, width=5, channels=32, heads=1, hidden=32)
        cases += [
            Case(op, f"{k} classes of 3x5 pixels", replace(narrow, classes=k), drop_path=True, narrow=True)
            for k in ATTENDED_K
        ]
    if op == "spatial_attention":
        narrow = Sizes(batch=1, classes=1, channels=32, heads=1)
        for side, _ in PUBLISHED_MAPS.values():
            name = f"{side**2} queries, {(side // 2) ** 2} keys"
            cases.append(Case(op, name, replace(narrow, height=side, width=side), narrow=True))
    return cases


def _up_steps(model: str, side: int) -> list[Case]:
    """The three steps of the up-decoder: [H, W, 128] to [H, W, 64], [2H, 2W, 32], [4H, 4W, 16]."""
    steps = (1, side, 128, of_same_size), (2, side, 64, None), (3, 2 * side, 32, None)
    grid = []
    for step, height, channels, change in steps:
        for classes in PUBLISHED_K if step == 1 else PUBLISHED_K[-1:]:
            sizes = Sizes(batch=1, classes=classes, height=height, width=height, channels=channels)
            own, published = _gigabytes("up_step", sizes, None)
            name = f"{model}, step {step}, {height}x{height}, K {classes}"
            case = Case("up_step", name, sizes, change, real=True, gigabytes=own, published_gigabytes=published)
            grid.append(case)
    return grid


def _of_model(op: str, model: str, side: int, dim: int) -> list[Case]:
    if op == "up_step":
        return _up_steps(model, side)
    base = Sizes(batch=1, words=847, height=side, width=side, channels=128, heads=4, hidden=384, embed=256, text=dim)
    if op in ("class_votes", "select_classes", "cost_volume"):
        pairs = [(k, t) for t in PUBLISHED_T for k in (PUBLISHED_K if op != "class_votes" else (48,))]
        if op == "cost_volume":
            pairs = [(k, t) for k, t in pairs if k <= t and (k == 48 or t in (20, 847))]
    else:
        pairs = [(k, 847) for k in PUBLISHED_K]
    if op == "upsample_bce":
        pairs = [(k, t) for k, t in ((16, 20), (24, 59), (32, 150), (32, 171), (48, 459), (48, 847), (48, 100_000))]
    grid = []
    for classes, words in pairs:
        sizes = replace(base, classes=classes, words=words)
        for label, change, sized in _outputs(op, sizes):
            slow = op == "cost_volume" and words > 847
            case = Case(op, _real_name(op, model, sized, label), sized, change, real=True, slow_half=slow)
            own, published = _gigabytes(op, sized, label)
            grid.append(replace(case, gigabytes=own, published_gigabytes=published))
    return grid


def _real_name(op: str, model: str, sizes: Sizes, label: tuple[int, int] | None) -> str:
    parts = [model, f"{sizes.height}x{sizes.width}"]
    if op != "class_votes":
        parts.append(f"K {sizes.classes}")
    if op in ("class_votes", "select_classes", "cost_volume", "upsample_bce"):
        parts.append(f"T {sizes.words}")
    return ", ".join(parts + ([f"to {label[0]}x{label[1]}"] if label else []))


def _outputs(op: str, sizes: Sizes) -> list[tuple[tuple[int, int] | None, Callable[[Sample], Sample] | None, Sizes]]:
    """Label maps are made from logits at a quarter of the image, in several sizes."""
    quarter = replace(sizes, height=4 * sizes.height, width=4 * sizes.width)
    if op == "upsample_argmax":
        return [(size, _with_argument(2, partial(_given, size)), quarter) for size in LABEL_MAPS]
    if op == "upsample_bce":
        targets = (CROP, CROP)
        return [(targets, _with_argument(2, partial(_targets, size=targets, words=sizes.words)), quarter)]
    return [(None, None, sizes)]


def _given(value: Any, instead_of: Any) -> Any:
    return value


def _targets(like: Tensor, size: tuple[int, int], words: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(like))
    target = torch.randint(words, (len(like), *size), generator=generator)
    return target.masked_fill(torch.rand(target.shape, generator=generator) < 0.1, 255)


def _gigabytes(op: str, s: Sizes, label: tuple[int, int] | None) -> tuple[float, float]:
    """What the float64 run with gradients needs, and the run in the published order: estimates on the high side."""
    pixels = s.batch * s.height * s.width
    tokens = pixels * s.classes * s.channels
    text = 4 * s.words * s.text
    outputs = s.batch * math.prod(label) if label else 0
    numbers: dict[str, tuple[float, float]] = {
        "class_votes": (text + 4 * pixels * s.text + (16 << 20), text + 4 * pixels * s.words),
        "select_classes": (20 * s.words, 20 * s.words),
        "cost_volume": (text + 6 * pixels * (s.text + s.classes), text + 4 * pixels * (s.words + s.text)),
        "cost_embedding": (12 * tokens, 6 * tokens * s.embed / s.channels),
        "gated_mlp": (24 * tokens, 28 * tokens),
        "depthwise_conv": (14 * tokens, 18 * tokens),
        "spatial_attention": (32 * tokens, 48 * tokens),
        "class_attention": (14 * tokens, 18 * tokens),
        "upsample_residual": (4 * tokens, 6 * tokens),
        "up_step": (28 * tokens, 36 * tokens),
        "upsample_argmax": (4 * pixels * s.classes + (24 << 20) + 6 * outputs, 3 * outputs * s.classes),
        "upsample_bce": (8 * outputs * s.classes, 3 * outputs * s.words),
    }
    own, published = numbers[op]
    return own * 8 / 1e9, published * 8 / 1e9
