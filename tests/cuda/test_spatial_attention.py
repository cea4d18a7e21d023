"""The CUDA kernels of spatial_attention, emulated, between the products of their host functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.ops import reference, spatial_windows
from errseg.ops.cuda import spatial_attention as host
from errseg.ops.spatial_attention import OP
from errseg.testing import assert_close
from tests.cuda import attention
from tests.cuda.attention import EPS, HALF, Emulate, assert_all_close, linear, nan
from tests.cuda.emulated import TYPES

SOURCE = "spatial_attention/spatial_attention.cuh"
SMALLEST, USUAL = 0, 113 << 10  # shared memory: stages of 32 keys, or two blocks on an H100


device = attention.device_fixture("spatial_attention")


@dataclass(frozen=True)
class Shape(attention.Shape):
    window: int = 2

    @property
    def num_keys(self) -> int:
        return (self.height // self.window) * (self.width // self.window)


class Kernels:
    """The library's ops, emulated."""

    def __init__(self, device: Any, seed: int = 0, room: int = USUAL) -> None:
        self.device, self.seed, self.room = device, seed, room

    @staticmethod
    def problem(x: Tensor, heads: int, window: int, eps: float) -> tuple[Any, ...]:
        *maps, height, width, channels = x.shape
        sizes = torch.tensor([math.prod(maps), maps[-1], height, width, channels, heads, window])
        return TYPES[x.dtype], sizes, torch.tensor(eps), x

    def spatial_attention_cuda_attend(
        self, x: Tensor, query_map: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        out_weight, out_bias, drop_path, heads, window, eps, training = rest
        assert drop_path is None or drop_path.data_ptr() % 16 == 0  # as the library wants it
        tokens = -(-x.shape[2] // window) * -(-x.shape[3] // window) * window**2
        out, mixture = (nan(*x.shape, dtype=x.dtype) for _ in range(2))
        log_sums = nan(*x.shape[:2], heads, tokens, dtype=torch.float32)
        inputs = *self.problem(x, heads, window, eps), query_map, key, value, query_weight
        outputs = out, mixture if training else None, log_sums if training else None
        self.device("forward", self.seed, self.room, *inputs, out_weight, out_bias, drop_path, *outputs)
        return out, *((mixture, log_sums) if training else (out.new_empty(0),) * 2)

    def spatial_attention_cuda_attend_bwd(
        self, grad: Tensor, x: Tensor, query_map: Tensor, key: Tensor, value: Tensor, query_weight: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        out_weight_transposed, mixture, log_sums, window, eps = rest
        inputs = *self.problem(x, log_sums.shape[2], window, eps), query_map, key, value, query_weight
        tokens = *x.shape[:2], log_sums.shape[3], x.shape[-1]
        z, query, mixture_grad, query_grad = (nan(*tokens, dtype=x.dtype) for _ in range(4))
        deltas = nan(*log_sums.shape, dtype=torch.float32)
        key_grad, value_grad = (nan(*key.shape, dtype=x.dtype) for _ in range(2))
        saved = grad, out_weight_transposed, mixture, log_sums
        outputs = z, query, mixture_grad, query_grad, deltas, key_grad, value_grad
        self.device("backward", self.seed, self.room, *inputs, *saved, *outputs)
        return z, query_grad, key_grad, value_grad

    def spatial_attention_cuda_windows(self, x: Tensor, window: int, eps: float) -> Tensor:
        keys = x.shape[0] * (x.shape[1] // window) * (x.shape[2] // window)
        result = nan(keys, window**2 * x.shape[-1], dtype=x.dtype)
        self.device("windows", self.seed, *self.problem(x, 1, window, eps), result)
        return result

    def spatial_attention_cuda_pixels(self, grad: Tensor, x: Tensor, z_grad: Tensor, window: int, eps: float) -> Tensor:
        result = nan(*x.shape, dtype=x.dtype)
        self.device("pixels", self.seed, *self.problem(x, 1, window, eps), grad, z_grad, result)
        return result

    def spatial_attention_cuda_rows(self, reduced: Tensor, added: Tensor, eps: float, gradient: Tensor | None) -> None:
        keys = added.shape[-2] if added.ndim > 1 else 1
        classes = len(reduced) // (keys * (len(added) if added.ndim > 2 else 1))
        sizes = *reduced.shape, classes, keys
        type_and_eps = TYPES[reduced.dtype], torch.tensor(eps)
        self.device("rows", self.seed, *type_and_eps, *sizes, added, added.ndim > 1, reduced, gradient)


def draw(shape: Shape, dtype: torch.dtype, *, drop: bool = False, scale: float = 2.0) -> tuple[Any, ...]:
    """Arguments of the raw op with values that `dtype` holds; the larger the scale, the sharper the softmax."""
    s, c = shape, shape.channels
    area = s.window**2

    tensors = (
        torch.randn(s.batch, s.classes, s.height, s.width, c),
        torch.randn(s.batch, s.height, s.width, c) / 2,
        torch.randn(s.batch, s.num_keys, 2 * c) / 2,
        linear(c, c, scale),
        linear(2 * c, area * c),
        linear(c, 2 * c, scale),
        linear(c, area * c),
        torch.randn(c) / 4,
        linear(c, c),
        torch.randn(c) / 4,
        linear(c, c),
        torch.randn(c) / 4,
    )
    mask = torch.arange(s.batch * s.classes).view(s.batch, s.classes) % 3 * 1.5 if drop else None
    return *(t.to(dtype) for t in tensors), None if mask is None else mask.to(dtype), s.heads, EPS


@torch.no_grad()
def run(
    device: Any, arguments: tuple[Any, ...], grad: Tensor, *, seed: int = 0, room: int = USUAL
) -> tuple[Tensor, ...]:
    """The result and the gradients, from the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "kernels", Kernels(device, seed, room))
        out, *saved = host.forward(*arguments, True)
        return out, *host.backward(grad, *arguments, *saved, [True] * 12)


def expected(arguments: tuple[Any, ...], grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return attention.expected(reference.spatial_attention, 12, arguments, grad, dtype)


NAMES = "result", *OP.differentiable
TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.006}


def check(device: Any, shape: Shape, dtype: torch.dtype, *, drop: bool = False, **options: Any) -> None:
    """Every number is near to that of float64."""
    arguments = draw(shape, dtype, drop=drop)
    grad = torch.randn_like(arguments[0])
    found, right = run(device, arguments, grad, **options), expected(arguments, grad, torch.float64)
    assert_all_close(NAMES, found, right, dtype, TOLERANCES[dtype])


SHAPES = {
    "one key": Shape(1, 1, 2, 2, 16, 2),
    "odd map, heads of 8": Shape(2, 2, 3, 7, 32, 4),
    "heads of 16": Shape(1, 2, 6, 5, 64, 4),
    "heads of 24": Shape(1, 1, 5, 8, 48, 2),
    "heads of 40": Shape(1, 1, 4, 6, 80, 2),
    "one head of 64": Shape(1, 2, 9, 8, 64, 1),
    "published": Shape(1, 1, 13, 15, 128, 4),
    "wide": Shape(1, 1, 5, 7, 256, 4),
    "wide, narrow heads": Shape(1, 2, 4, 18, 144, 6),
    "windows of 3": Shape(1, 1, 7, 9, 32, 1, 3),
    "windows of 1": Shape(1, 1, 4, 5, 32, 1, 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_widths_and_odd_maps(device: Any, name: str) -> None:
    dtype = HALF[SHAPES[name].channels % 64 == 0]
    check(device, SHAPES[name], dtype, drop=SHAPES[name].classes > 1, seed=1)


@pytest.mark.parametrize("room", [SMALLEST, USUAL])
@pytest.mark.parametrize("keys", [15, 33, 64, 65, 96, 97])
def test_tails_of_stages(device: Any, keys: int, room: int) -> None:
    check(device, Shape(1, 1, 2, 2 * keys, 32, 1), torch.float16, room=room)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [Shape(1, 2, 17, 15, 32, 2), Shape(1, 1, 12, 12, 128, 4)], ids=["odd", "published"])
def test_errors_are_at_most_twice_eager(device: Any, shape: Shape, dtype: torch.dtype) -> None:
    arguments = draw(shape, dtype, drop=shape.classes > 1)
    grad = torch.randn_like(arguments[0])
    runs = run(device, arguments, grad), *(expected(arguments, grad, t) for t in (dtype, torch.float64))
    attention.assert_all_within_eager_error(NAMES, *runs)


def test_log_sums_keys_and_values(device: Any) -> None:
    """What forward saves, in the order of the windows, of an odd map."""
    shape = Shape(1, 2, 5, 7, 32, 2)
    arguments = draw(shape, torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "kernels", Kernels(device))
        out, mixture, log_sums, key, value = host.forward(*arguments, True)
        alone, *nothing = host.forward(*arguments, False)
    assert torch.equal(alone, out) and [t.numel() for t in nothing] == [0] * 4
    foretold = spatial_windows.fake_saved(*arguments)
    assert [(t.shape, t.dtype) for t in (mixture, log_sums, key, value)] == [(t.shape, t.dtype) for t in foretold]
    x, query_map, *_, query_weight = (t.double() for t in arguments[:4])
    z = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
    query = (z @ query_weight.T + query_map[:, None]).flatten(2, 3).unflatten(-1, (2, 16)).transpose(2, 3)
    scores = query @ key.double().unflatten(-1, (2, 16)).permute(0, 1, 3, 4, 2) / 16**0.5
    by_pixel = scores.logsumexp(-1) / math.log(2)  # [B, K, heads, H W]
    padded = torch.nn.functional.pad(by_pixel.unflatten(-1, (5, 7)), (0, 1, 0, 1), value=torch.nan)
    wanted = padded.unflatten(-1, (4, 2)).unflatten(-3, (3, 2)).transpose(-3, -2).flatten(-4)
    there = ~wanted.isnan()
    assert there.sum() == by_pixel.numel() and log_sums.isfinite().all()
    assert_close(log_sums[there], wanted[there], 2e-3)
    mixed = scores.softmax(-1) @ value.double().unflatten(-1, (2, 16)).transpose(2, 3)
    assert_close(mixture.flatten(2, 3), mixed.transpose(2, 3).flatten(3), 2e-3)


def test_a_drop_path_of_any_layout(device: Any) -> None:
    *arguments, drop_path, heads, eps = draw(Shape(2, 3, 3, 4, 32, 2), torch.bfloat16, drop=True)
    grad = torch.randn_like(arguments[0])
    first = run(device, (*arguments, drop_path, heads, eps), grad)
    strided, transposed = drop_path.repeat_interleave(2, 1)[:, ::2], drop_path.T.contiguous().T
    shifted = torch.cat([drop_path.new_zeros(1), drop_path.flatten()])[1:].view(drop_path.shape)
    for other in (strided, transposed, shifted):
        assert all(map(torch.equal, run(device, (*arguments, other, heads, eps), grad), first))


def test_an_empty_batch(device: Any) -> None:
    arguments = draw(Shape(0, 3, 4, 5, 32, 2), torch.bfloat16)
    out, *grads = run(device, arguments, torch.empty_like(arguments[0]))
    assert out.shape == arguments[0].shape
    assert [g.shape for g in grads] == [t.shape for t in arguments[:12]] and not any(g.any() for g in grads)


def test_large_and_small_scores(device: Any) -> None:
    """Far from zero, with the maximum late or early, and equal keys."""
    for scale in (20.0, -20.0):
        arguments = draw(Shape(1, 1, 4, 40, 32, 1), torch.float16)
        x, query_map = arguments[:2]
        query_map += 8 * torch.sign(query_map)
        arguments[4].mul_(scale / 2)
        grad = torch.randn_like(x)
        found, exact = run(device, arguments, grad, room=SMALLEST), expected(arguments, grad, torch.float64)
        eager = expected(arguments, grad, torch.float16)
        attention.assert_all_within_eager_error(NAMES, found, eager, exact)


def check_far_below_zero(device: Any) -> None:
    """Scores around -250: keys that fill up a stage must not count, though their scores are zero."""
    arguments = draw(Shape(1, 1, 6, 10, 32, 2), torch.float16)
    _, query_map, key_map, query_weight, key_reduce_weight, key_weight = arguments[:6]
    query_map.add_(8), key_map.mul_(0.01).add_(1), query_weight.mul_(0.01), key_reduce_weight.mul_(0.01)
    key_weight.copy_(-5 * torch.eye(32, 64))
    grad = torch.randn_like(arguments[0])
    exact = expected(arguments, grad, torch.float64)
    found, eager = run(device, arguments, grad), expected(arguments, grad, torch.float16)
    attention.assert_all_within_eager_error(NAMES, found, eager, exact)


def test_every_schedule_and_stage_gives_the_same_numbers(device: Any) -> None:
    arguments = draw(Shape(1, 2, 9, 17, 48, 2), torch.bfloat16, drop=True)
    grad = torch.randn_like(arguments[0])
    first = run(device, arguments, grad)
    for seed in (1, 2):
        assert all(map(torch.equal, run(device, arguments, grad, seed=seed), first))
    assert all(map(torch.equal, run(device, arguments, grad, seed=3, room=SMALLEST), first))


def test_under_sanitizers(emulate: Emulate) -> None:
    sanitized = emulate("spatial_attention", sanitized=True)
    check(sanitized, Shape(1, 2, 3, 11, 48, 2), torch.bfloat16, drop=True, seed=5, room=SMALLEST)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("room", [49 << 10, 80 << 10, USUAL])
@pytest.mark.parametrize("channels", [16, 128, 256])
def test_stages_cover_all_keys_and_fit(device: Any, channels: int, room: int, tiles: int) -> None:
    for side in (2, 40, 41, 48, 96):
        sizes, plan = torch.tensor([1, 1, side, side, channels, max(1, channels // 32), 2]), torch.zeros(3).long()
        device("plan", sizes, tiles, room, plan)
        keys, parts, size = plan.tolist()
        assert keys % 32 == 0 and (parts - 1) * keys < (side // 2) ** 2 <= parts * keys
        assert size <= max(room, 99 << 10)  # what a block may have on the smallest GPU
        if (side, channels, room, tiles) == (40, 128, USUAL, 1):
            assert parts == 2  # all keys of a head


def test_reasons_are_named() -> None:
    def reason(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> str | None:
        return host.can_run(*draw(shape, dtype))

    assert reason(Shape(1, 1, 4, 4, 128, 4)) is None
    assert "bfloat16 or all of float16" in str(reason(Shape(1, 1, 4, 4, 32, 1), torch.float32))
    assert "multiples of 16, up to 256, got 24" in str(reason(Shape(1, 1, 4, 4, 24, 1)))
    assert "got 272" in str(reason(Shape(1, 1, 4, 4, 272, 17)))
    assert "multiples of 8, up to 64, got 12" in str(reason(Shape(1, 1, 4, 4, 48, 4)))
    assert "got 128" in str(reason(Shape(1, 1, 4, 4, 128, 1)))
    arguments = draw(Shape(1, 1, 4, 4, 32, 1), torch.bfloat16)
    assert "got torch.float16" in str(host.can_run(*arguments[:2], arguments[2].half(), *arguments[3:]))


FETCHED = "const bool inside = row < known_rows && column < known_columns;"
BREAKS = {
    "padding not cleared": (
        SOURCE,
        "if (lane < kRows) *reinterpret_cast<uint4*>",
        "if (false) *reinterpret_cast<uint4*>",
    ),
    "rows beyond the last key": (attention.TILES, FETCHED, FETCHED.replace("row < known_rows && ", "")),
    "guidance of the first image": (SOURCE, "int64_t(queries.map / p.num_classes) * p.num_pixels()", "int64_t(0)"),
    "delta without the padding's mask": (SOURCE, "if (n * 8 < width && pixel >= 0) {", "if (pixel >= 0) {"),
    "delta left out for keys": (SOURCE, "Statistics{log_sums[token], deltas[token]}", "Statistics{log_sums[token]}"),
    "second stage of queries twice": (SOURCE, "i ? (i - 1) * kKeys : first", "i ? (i > 1) * kKeys : first"),
    "pixels' mean kept": (SOURCE, "(dz.pairs[i].low - mean -", "(dz.pairs[i].low -"),
    "scores of missing keys": (attention.HEADS, "return column < count;", "return true;"),
    "a full step too soon": (attention.HEADS, "leading.count >= columns", "leading.count > 0"),
    "maximum of one lane": (attention.HEADS, "fmaxf(highest[half], quad_max(top))", "fmaxf(highest[half], top)"),
    "mixture not rescaled": attention.NOT_RESCALED,
    "no barrier between stages": attention.NO_BARRIER,
    "stages not waited for": (attention.TILES, attention.WAITED, attention.WAITED.replace("<0>", "<1>")),
}


def check_all(device: Any) -> None:
    check(device, Shape(2, 2, 5, 39, 48, 2), torch.bfloat16, drop=True, seed=1, room=SMALLEST)
    check(device, Shape(2, 1, 13, 14, 32, 4), torch.bfloat16, drop=True, seed=2)
    check_far_below_zero(device)


def test_the_whole_kernel_holds(device: Any) -> None:
    check_all(device)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(emulate: Emulate, name: str) -> None:
    attention.assert_broken(emulate, "spatial_attention", BREAKS[name], check_all)
