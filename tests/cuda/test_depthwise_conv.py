"""The CUDA kernels of depthwise_conv, emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.ops import reference
from errseg.testing import assert_close, assert_within_eager_error
from tests.cuda.emulated import TYPES, EmulatorFault

Emulate = Callable[..., Any]
SOURCE = "depthwise_conv/depthwise_conv.cuh"
# B, K, H, W, C, k; the walk takes float32 whose C is a multiple of 4
WALKS = {
    "one pixel": (1, 2, 1, 1, 4, 7),
    "smaller than the window": (1, 1, 2, 3, 8, 7),
    "tails": (2, 2, 9, 11, 68, 7),  # of columns and of channels
    "strips": (1, 1, 37, 5, 24, 7),  # of rows
    "published channels": (1, 1, 8, 8, 128, 7),
}
PLAIN = {
    "one channel": (1, 2, 5, 6, 1, 7),
    "odd channels": (1, 1, 4, 9, 35, 7),
    "small window": (1, 2, 18, 5, 8, 3),
    "one tap": (1, 1, 3, 4, 4, 1),
    "large window": (1, 1, 5, 6, 4, 9),
}


@pytest.fixture(scope="module")
def device(emulate: Emulate) -> Any:
    return emulate("depthwise_conv")


class Call:
    """Random arguments on the bfloat16 grid, one class dropped; `run` gives result and gradients of the kernels."""

    def __init__(self, shape: tuple[int, ...], *, options: bool = True) -> None:
        *self.shape, channels, size = shape
        self.sizes = (shape[0] * shape[1], *shape[2:])
        self.x, self.grad, residual = (_draw(*self.shape, channels) for _ in range(3))
        self.weight = _draw(channels, 1, size, size) / 8
        self.residual = residual if options else None
        self.bias = _draw(channels) if options else None
        self.scales = torch.full(self.shape[:2], 1.25).double() if options else None
        if self.scales is not None and self.scales.numel() > 1:
            self.scales.view(-1)[0] = 0

    def to(self, dtype: torch.dtype) -> Call:
        other = Call.__new__(Call)
        other.__dict__ = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return other

    def expected(self, backward: bool = True) -> tuple[Tensor, ...]:
        """Result, and gradients of x, weight and bias."""
        leaves = [t.detach().clone().requires_grad_() for t in (self.x, self.weight, self.bias) if t is not None]
        x, weight, bias = (*leaves, None)[:3]
        out = reference.depthwise_conv(x, weight, bias, self.residual, self.scales)
        return (out.detach(), *(torch.autograd.grad(out, leaves, self.grad) if backward else ()))

    def run(self, device: Any, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The same from the kernels, into poisoned memory; weight, bias and scales may have a dtype of their own."""
        dtype = dtype or self.x.dtype
        types = TYPES[self.x.dtype], TYPES[dtype]
        weight, bias, scales = (None if t is None else t.to(dtype) for t in (self.weight, self.bias, self.scales))
        out, of_x = (torch.full_like(self.x, float("nan")) for _ in range(2))
        of_weight, of_bias = (torch.full_like(t, float("nan")) for t in (weight, weight[:, 0, 0, 0].contiguous()))
        device("convolve", seed, *types, self.x, weight, False, bias, scales, self.residual, out, *self.sizes)
        device("convolve", seed, *types, self.grad, weight, True, None, scales, None, of_x, *self.sizes)
        walked = torch.zeros(1, dtype=torch.int64)
        device("gather", seed, *types, self.x, self.grad, scales, of_weight, of_bias, *self.sizes, walked)
        self.walked = bool(walked)
        return (out, of_x, of_weight, of_bias)[: 3 if bias is None else 4]


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().double()


def check(device: Any, shape: tuple[int, ...], seed: int = 0, walks: bool = True) -> None:
    """Float32 against float64 of the same arguments: at most twice eager's error."""
    call = Call(shape).to(torch.float32)
    truth, eager = call.to(torch.float64).expected(), call.expected()
    for mine, other, wanted in zip(call.run(device, seed), eager, truth, strict=True):
        assert_within_eager_error(mine, other, wanted)
    assert call.walked == walks


@pytest.mark.parametrize("name", WALKS)
def test_the_walk(device: Any, name: str) -> None:
    check(device, WALKS[name], seed=1)


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_kernels(device: Any, name: str) -> None:
    check(device, PLAIN[name], seed=2, walks=False)


@pytest.mark.parametrize("name", ["tails", "odd channels", "small window"])
def test_float64(device: Any, name: str) -> None:
    call = Call((WALKS | PLAIN)[name])
    for mine, wanted in zip(call.run(device, seed=3), call.expected(), strict=True):
        assert_close(mine, wanted, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [24, 20])  # with and without the walk
def test_half_precision(device: Any, dtype: torch.dtype, channels: int) -> None:
    call = Call((1, 2, 6, 9, channels, 7)).to(dtype)
    truth = call.to(torch.float64).expected()
    mixed = call.run(device, dtype=torch.float32)  # float32 weights, as under autocast
    for mine, other, wanted, of_mixed in zip(call.run(device), call.expected(), truth, mixed, strict=True):
        assert_within_eager_error(mine, other, wanted)
        assert_within_eager_error(of_mixed.to(dtype), other, wanted)
    assert call.walked == (channels == 24)


def test_without_options(device: Any) -> None:
    call = Call(WALKS["tails"], options=False).to(torch.float32)
    for mine, other, wanted in zip(call.run(device), call.expected(), call.to(torch.float64).expected(), strict=True):
        assert_within_eager_error(mine, other, wanted)


def test_a_block_gathers_from_several_maps(emulate: Emulate) -> None:
    fewer_blocks = emulate("depthwise_conv", edits={SOURCE: ("kEnoughBlocks = 384", "kEnoughBlocks = 2")})
    check(fewer_blocks, (1, 11, 9, 3, 8, 7), seed=4)  # two maps each, one left
    check(fewer_blocks, (1, 11, 9, 3, 5, 7), seed=4, walks=False)


def test_what_plain_blocks_gather_does_not_grow_with_the_maps(device: Any) -> None:
    def megabytes(maps: int) -> float:
        units = torch.zeros(1, dtype=torch.int64)
        device("plain_units", maps, 24, 24, 128, units)
        return int(units) * 50 * 128 * 8 / 2**20

    assert max(map(megabytes, (1, 100, 8 * 847))) < 16


def test_random_shapes(device: Any) -> None:
    for seed in range(8):
        b, k, height, width, groups = (int(torch.randint(1, most, ())) for most in (3, 4, 20, 20, 20))
        check(device, (b, k, height, width, 4 * groups, 7), seed)


def test_the_result_is_the_same_in_every_schedule(device: Any) -> None:
    call = Call(WALKS["tails"]).to(torch.float32)
    first = call.run(device)
    for seed in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(call.run(device, seed), first, strict=True))


@pytest.mark.parametrize("name", ["smaller than the window", "tails", "odd channels"])
def test_under_sanitizers(emulate: Emulate, name: str) -> None:
    check(emulate("depthwise_conv", sanitized=True), (WALKS | PLAIN)[name], seed=5, walks=name in WALKS)


BREAKS = {
    "last column of blocks dropped": ("ceil_div(m.width, kColumns)", "std::max(1, m.width / kColumns)"),
    "a strip begins too late": ("from = data + (int64_t", "from = data + m.pitch + (int64_t"),
    "beside the map": ("0 <= x && x < m.width &&", "0 <= x &&"),
    "window not turned": ("p.turned ? kTaps - 1 - tap : tap", "tap"),
    "rows of sums mixed up": ("sums[(phase + 1) % kSize][j]", "sums[phase][j]"),
    "sums not cleared": ("sums[phase][j] = zero();", ""),
    "no barrier before a row is read": (
        "wait_async<kAhead - 1>();\n        __syncthreads();",
        "wait_async<kAhead - 1>();",
    ),
    "a row is not waited for": ("wait_async<kAhead - 1>();", "wait_async<kAhead>();"),
    "the last warp's sums lost": ("turn < kWarps; ++turn", "turn < kWarps - 1; ++turn"),
    "gradients of the row below the strip": ("step < rows && j < columns ?", "j < columns ?"),
    "scale of the first map alone": (
        "p.scales.template read<float>(map) : 1.f",
        "p.scales.template read<float>(0) : 1.f",
    ),
    "a unit left out of the sum": ("unit = row; unit < units &&", "unit = row; unit < units - 1 &&"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(emulate: Emulate, name: str) -> None:
    broken = emulate("depthwise_conv", edits={SOURCE: BREAKS[name]})
    with pytest.raises((AssertionError, EmulatorFault)):
        check(broken, WALKS["tails"], seed=1)
