"""The CUDA kernels of class_attention, emulated, between the products of their host functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.ops import reference
from errseg.ops.class_attention import OP
from errseg.ops.cuda import class_attention as host
from errseg.testing import AllocationSpy, assert_close
from tests.cuda import attention
from tests.cuda.attention import EPS, HALF, Emulate, assert_all_close, linear, nan
from tests.cuda.emulated import TYPES

SOURCE = "class_attention/class_attention.cuh"
H200, A100, SMALL = (227 << 10, 1), (163 << 10, 2), (99 << 10, 1)  # memory of a block; so few multiprocessors fill it
DIFFERENTIABLE = len(OP.differentiable)


device = attention.device_fixture("class_attention")


@dataclass(frozen=True)
class Shape(attention.Shape):
    hidden: int


class Kernels:
    """The library's ops, emulated."""

    def __init__(self, device: Any, seed: int = 0, on: tuple[int, int] = H200) -> None:
        self.device, self.seed, self.on = device, seed, torch.tensor(on)

    def problem(self, maps: Tensor, height: int, width: int, weights: list[Any], *rest: Any) -> tuple[Any, ...]:
        drop_attention, drop_mlp, heads, eps = rest
        sizes = torch.tensor(
            [*maps.shape[:2], height, width, maps.shape[-1], heads, len(weights[8]), weights[0] is not None]
        )
        return self.on, TYPES[maps.dtype], sizes, torch.tensor(eps), *weights, drop_attention, drop_mlp

    def rows_problem(self, sums: Tensor, mlp: list[Tensor], drop_mlp: Tensor | None, eps: float) -> tuple[Any, ...]:
        heads = sums.shape[1] // 16
        return self.problem(sums[None, None], 1, len(sums), [*[None] * 8, *mlp], None, drop_mlp, heads, eps)

    def class_attention_cuda_most_classes(self, like: Tensor, heads: int, hidden: int) -> int:
        result = torch.zeros(1).long()
        sizes = torch.tensor([1, 1, 1, 1, like.shape[-1], heads, hidden])
        self.device("most_classes", self.on, sizes, result)
        return int(result)

    def class_attention_cuda_fwd(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        batch, classes, height, width, channels = x.shape
        problem, training = self.problem(x, height // 2, width // 2, *rest[:-1]), rest[-1]
        out, pooled = (nan(batch, classes, height // 2, width // 2, channels, dtype=x.dtype) for _ in range(2))
        self.device("forward", self.seed, *problem, height, width, x, pooled if training else None, out)
        return out, pooled if training else x.new_empty(0)

    def class_attention_cuda_mlp_fwd(self, sums: Tensor, *rest: Any) -> Tensor:
        out = nan(*sums.shape, dtype=sums.dtype)
        self.device("forward", self.seed, *self.rows_problem(sums, *rest), 0, 0, sums, None, out)
        return out

    def mlp_bwd(self, grad: Tensor, source: Tensor, problem: tuple[Any, ...], first: int, pixels: int) -> Any:
        rows = pixels * int(problem[2][1])
        channels, hidden = source.shape[-1], int(problem[2][6])
        sizes = channels, channels, hidden, 2 * hidden, channels
        results = [nan(rows, columns, dtype=source.dtype) for columns in sizes]
        self.device("backward_mlp", self.seed, *problem, first, pixels, grad, source, *results)
        return results

    def class_attention_cuda_mlp_bwd(self, grad: Tensor, pooled: Tensor, *rest: Any) -> Any:
        return self.mlp_bwd(grad, pooled, self.problem(pooled, *pooled.shape[2:4], *rest[:-2]), *rest[-2:])

    def class_attention_cuda_mlp_rows_bwd(self, grad: Tensor, sums: Tensor, *rest: Any) -> Any:
        return self.mlp_bwd(grad, sums, self.rows_problem(sums, *rest), 0, len(sums))

    def class_attention_cuda_attention_bwd(self, sum_grad: Tensor, pooled: Tensor, *rest: Any) -> Any:
        first, pixels, transposed, x_grad, height, width = rest[5:]
        problem = self.problem(pooled, *pooled.shape[2:4], *rest[:5])
        rows, channels = pixels * pooled.shape[1], pooled.shape[-1]
        results = [nan(rows, columns, dtype=pooled.dtype) for columns in (channels, channels, channels, 3 * channels)]
        self.device(
            *("backward_attention", self.seed, *problem, first, pixels, sum_grad, pooled, transposed),
            *(*results, x_grad, height, width),
        )
        if rest[1] is None:
            assert results[1].isnan().all()
            results[1] = pooled.new_empty(0)
        return results

    def class_attention_cuda_stream_fwd(self, rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        pixels, classes, _, channels = rows.shape
        mixture = nan(pixels, classes, channels, dtype=rows.dtype)
        log_sums = nan(pixels, heads, classes, dtype=torch.float32)
        sizes = torch.tensor([pixels, classes, channels, heads])
        self.device("stream", self.seed, TYPES[rows.dtype], sizes, rows, mixture, log_sums, None, None, None)
        return mixture, log_sums

    def class_attention_cuda_stream_bwd(
        self, rows: Tensor, mixture: Tensor, mixture_grad: Tensor, log_sums: Tensor
    ) -> Tensor:
        pixels, classes, _, channels = rows.shape
        statistics, rows_grad = nan(*log_sums.shape, 2, dtype=log_sums.dtype), nan(*rows.shape, dtype=rows.dtype)
        sizes = torch.tensor([pixels, classes, channels, log_sums.shape[1]])
        inputs = rows, mixture, log_sums, mixture_grad
        self.device("stream", self.seed, TYPES[rows.dtype], sizes, *inputs, statistics, rows_grad)
        return rows_grad


def draw(shape: Shape, dtype: torch.dtype, *, drop: bool = False, scale: float = 2.0) -> tuple[Any, ...]:
    """Arguments of the raw op with values that `dtype` holds; the larger the scale, the sharper the softmax.

    Every ReLU6 is below 0, inside, or above 6 by more than rounding can move it.
    """
    s, c = shape, shape.channels
    ends = torch.tensor([-3.0, 3.0, 9.0])

    tensors = (
        torch.randn(s.batch, s.classes, s.height, s.width, c),
        *(torch.randn(s.batch, s.classes, c) for _ in range(2)),
        *(linear(c, c, scale), linear(c, c), linear(c, c), torch.randn(c) / 4, linear(c, c), torch.randn(c) / 4),
        *(linear(s.hidden, c, 1 / 4), ends[torch.randint(3, (s.hidden,))]),
        *(linear(s.hidden, c, 2), torch.randn(s.hidden) / 4),
        *(linear(c, s.hidden, 1 / 16), ends[torch.randint(3, (c,))]),
    )
    masks: tuple[Tensor | None, Tensor | None] = None, None
    if drop:
        pixels = torch.arange(s.batch * (s.height // 2) * (s.width // 2)).view(s.batch, s.height // 2, -1)
        masks = (pixels % 3 * 0.75).to(dtype), ((pixels + 1) % 2 * 2.0).to(dtype)
    return *(t.to(dtype) for t in tensors), *masks, s.heads, EPS


@torch.no_grad()
def run(
    device: Any, arguments: tuple[Any, ...], grad: Tensor, *, seed: int = 0, on: tuple[int, int] = H200, slab: int = 0
) -> tuple[Tensor, ...]:
    """The result and the gradients, from the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "kernels", Kernels(device, seed, on))
        if slab:
            patch.setattr(host, "SLAB_BYTES", slab)
        out, *saved = host.forward(*arguments, True)
        forgotten = torch.full((), torch.nan, dtype=out.dtype).expand(arguments[0].shape)
        return out, *host.backward(grad, forgotten, *arguments[1:], *saved, [True] * DIFFERENTIABLE)


def expected(arguments: tuple[Any, ...], grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return attention.expected(reference.class_attention, DIFFERENTIABLE, arguments, grad, dtype)


NAMES = "result", *OP.differentiable
TOLERANCES = {torch.bfloat16: 0.06, torch.float16: 0.008}


def gradient_for(arguments: tuple[Any, ...]) -> Tensor:
    batch, classes, height, width, channels = arguments[0].shape
    return torch.randn(batch, classes, height // 2, width // 2, channels).to(arguments[0].dtype)


def check(device: Any, shape: Shape, dtype: torch.dtype, *, drop: bool = False, **options: Any) -> None:
    """Every number is near to that of float64."""
    arguments = draw(shape, dtype, drop=drop)
    grad = gradient_for(arguments)
    found, right = run(device, arguments, grad, **options), expected(arguments, grad, torch.float64)
    assert_all_close(NAMES, found, right, dtype, TOLERANCES[dtype])


SHAPES = {
    "one class": Shape(2, 1, 4, 10, 32, 2, 48),
    "two classes": Shape(1, 2, 2, 6, 32, 4, 40),
    "seven classes, odd map": Shape(2, 7, 5, 7, 32, 2, 96),
    "16 classes": Shape(1, 16, 4, 5, 64, 4, 64),
    "24 classes": Shape(1, 24, 4, 4, 48, 2, 64),
    "32 classes, heads of 40": Shape(1, 32, 2, 4, 80, 2, 48),
    "48 classes, published": Shape(1, 48, 2, 4, 128, 4, 384),
    "64 classes, one head of 64": Shape(1, 64, 2, 2, 64, 1, 32),
    "wide": Shape(1, 17, 2, 6, 256, 4, 48),
    "wide, narrow heads": Shape(1, 5, 4, 4, 144, 6, 24),
    "all rows of a block": Shape(1, 96, 2, 2, 32, 1, 32),
    "more than a block": Shape(1, 97, 3, 4, 32, 2, 48),
    "more than a block, wide": Shape(2, 65, 2, 2, 144, 3, 40),
}


@pytest.mark.parametrize("name", SHAPES)
def test_classes_widths_and_odd_maps(device: Any, name: str) -> None:
    dtype = HALF[SHAPES[name].channels % 64 == 0]
    check(device, SHAPES[name], dtype, drop=SHAPES[name].batch > 1 or SHAPES[name].height > 2, seed=1)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("classes", [12, 65])
def test_errors_are_at_most_twice_eager(device: Any, classes: int, dtype: torch.dtype) -> None:
    """Of several pixels in a block, and of more classes than a block of wide heads has rows."""
    shape = Shape(1, 12, 6, 6, 64, 4, 96) if classes == 12 else Shape(1, classes, 2, 4, 64, 1, 48)
    arguments = draw(shape, dtype, drop=True)
    grad = gradient_for(arguments)
    runs = run(device, arguments, grad), *(expected(arguments, grad, t) for t in (dtype, torch.float64))
    attention.assert_all_within_eager_error(NAMES, *runs)


SCHEDULES = (1, H200), (2, A100), (3, SMALL), (4, (40 << 10, 1)), (5, (227 << 10, 100))


def test_every_schedule_device_and_slab_gives_the_same_numbers_where_classes_fill_whole_steps(device: Any) -> None:
    arguments = draw(Shape(2, 16, 4, 7, 48, 2, 40), torch.bfloat16, drop=True)
    grad = gradient_for(arguments)
    first = run(device, arguments, grad)
    for seed, on in SCHEDULES:
        assert all(map(torch.equal, run(device, arguments, grad, seed=seed, on=on), first))
    pixel_bytes = 16 * (9 * 48 + 3 * 40) * 2
    for pixels in (1, 4, 9):  # parts of an image, and images
        out, x_grad, *others = run(device, arguments, grad, slab=pixels * pixel_bytes)
        assert torch.equal(out, first[0]) and torch.equal(x_grad, first[1])
        for name, got, wanted in zip(NAMES[2:], others, first[2:], strict=True):
            assert_close(got, wanted, 0.01, name)


def test_every_schedule_device_and_slab_gives_nearly_the_same_numbers(device: Any) -> None:
    """Whether the keys of a pixel fall into one step or two depends on where it stands in a block."""
    arguments = draw(Shape(2, 7, 4, 7, 48, 2, 40), torch.float16, drop=True)
    grad = gradient_for(arguments)
    first = run(device, arguments, grad)
    slabs = ({"slab": pixels * 7 * (9 * 48 + 3 * 40) * 2} for pixels in (1, 4, 9))
    for options in (*({"seed": seed, "on": on} for seed, on in SCHEDULES), *slabs):
        assert_all_close(NAMES, run(device, arguments, grad, **options), first, torch.float16, 0.003)


@pytest.mark.parametrize("classes", [5, 16, 97])
def test_permuting_the_classes_permutes_the_output(device: Any, classes: int) -> None:
    x, *texts_and_rest = draw(Shape(1, classes, 2, 4, 32, 2, 32), torch.float16)
    texts, rest = texts_and_rest[:2], texts_and_rest[2:]
    order = torch.randperm(classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "kernels", Kernels(device))
        straight, pooled = host.forward(x, *texts, *rest, True)
        permuted, nothing = host.forward(x[:, order].contiguous(), *(t[:, order] for t in texts), *rest, False)
    assert nothing.numel() == 0
    assert_close(permuted, straight[:, order], 2e-3)
    assert torch.equal(pooled, torch.nn.functional.avg_pool2d(x.flatten(0, 1).movedim(-1, 1), 2).movedim(1, -1)[None])


def check_far_below_zero(device: Any, classes: int) -> None:
    """Scores around -100: rows of other pixels and rows that fill up must not count, though their scores are zero."""
    arguments = draw(Shape(1, classes, 2, 6, 32, 2, 32), torch.float16)
    arguments[1].add_(9), arguments[2].mul_(0.1).sub_(9)
    arguments[1][:, ::2].mul_(-1)  # every other class far above
    grad = gradient_for(arguments)
    runs = run(device, arguments, grad), *(expected(arguments, grad, t) for t in (torch.float16, torch.float64))
    attention.assert_all_within_eager_error(NAMES, *runs)


@pytest.mark.parametrize("classes", [7, 100])
def test_far_below_and_above_zero(device: Any, classes: int) -> None:
    check_far_below_zero(device, classes)


def test_only_what_is_needed_is_made(device: Any) -> None:
    """Flags switch products off, and the whole second launch with all of the attention's."""
    for classes in (3, 97):
        arguments = draw(Shape(1, classes, 2, 3, 32, 2, 24), torch.bfloat16)
        grad = gradient_for(arguments)
        whole = run(device, arguments, grad)[1:]
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(host, "kernels", Kernels(device))
            _, pooled = host.forward(*arguments, True)
            for wanted in ({0}, {1, 6}, {3}, {7, 8, 9}, {12}, {13, 14}):
                needed = [i in wanted for i in range(DIFFERENTIABLE)]
                found = host.backward(grad, *arguments, pooled, needed)
                assert all(torch.equal(found[i], whole[i]) for i in wanted)


def test_an_empty_batch(device: Any) -> None:
    arguments = draw(Shape(0, 3, 4, 4, 32, 2, 24), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "kernels", Kernels(device))
        out, pooled = host.forward(*arguments, True)
        grads = host.backward(torch.empty_like(out), *arguments, pooled, [True] * DIFFERENTIABLE)
    assert out.shape == pooled.shape == (0, 3, 2, 2, 32)
    assert [g.shape for g in grads] == [t.shape for t in arguments[:DIFFERENTIABLE]]
    assert not any(g.any() for g in grads)


def test_a_launch_of_its_own_makes_the_pooled_map(device: Any) -> None:
    """The host makes none beside it."""
    arguments = draw(Shape(1, 5, 4, 6, 32, 2, 24), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, AllocationSpy() as spy:
        patch.setattr(host, "kernels", Kernels(device))
        host.forward(*arguments, True)
    assert [a.shape for a in spy.allocations if a.shape[-1:] == (32,)] == [(1, 5, 2, 3, 32)] * 2


def test_under_sanitizers(emulate: Emulate) -> None:
    sanitized = emulate("class_attention", sanitized=True)
    check(sanitized, Shape(1, 7, 3, 5, 48, 2, 40), torch.bfloat16, drop=True, seed=5)
    check(sanitized, Shape(1, 97, 2, 2, 32, 4, 24), torch.bfloat16, drop=True, seed=6)


def test_classes_that_blocks_hold(device: Any) -> None:
    """All of the published K on every GPU; a smaller memory takes fewer classes, and none where nothing fits."""

    def most(channels: int, heads: int, hidden: int, on: tuple[int, int]) -> int:
        text = torch.empty(1, 1, channels, dtype=torch.bfloat16)
        return Kernels(device, on=on).class_attention_cuda_most_classes(text, heads, hidden)

    assert most(128, 4, 384, H200) == most(128, 4, 384, A100) == 96
    assert most(256, 4, 768, H200) == most(256, 4, 768, A100) == 64
    assert most(128, 4, 384, SMALL) == 80
    assert most(256, 8, 768, (64 << 10, 1)) == 0


@pytest.mark.parametrize("name", ["mlp_out_bias", "mlp_gate_bias", "key_text"])
def test_what_is_no_number_stays_none(device: Any, name: str) -> None:
    """ReLU6 does not make a number of it; vectorised loops of the reference block its gradient, ours never do."""
    arguments = draw(Shape(1, 5, 4, 6, 32, 2, 24), torch.bfloat16)
    arguments[OP.differentiable.index(name)].view(-1)[3] = torch.nan
    grad = gradient_for(arguments)
    found, right = run(device, arguments, grad), expected(arguments, grad, torch.float32)
    assert right[0].isnan().any() and torch.equal(found[0].isnan(), right[0].isnan())
    for part, got, wanted in zip(NAMES[1:], found[1:], right[1:], strict=True):
        assert (got.isnan() >= wanted.isnan()).all(), part
    if name == "mlp_out_bias":
        assert found[NAMES.index(name)][3] != 0


def test_offsets_are_counted_in_64_bits(device: Any) -> None:
    """Of maps with more than 2^31 numbers."""
    pixels, classes, channels, heads = 100, 10**6, 64, 2
    found, tiles = torch.zeros(4, dtype=torch.int64), -(-classes // 64)
    device("stream_offsets", torch.tensor([pixels, classes, channels, heads]), 99 * tiles + 5, found)
    row = 99 * classes
    rows = row * 3 * channels + 2 * channels
    assert found.tolist() == [rows, rows, row * channels, 99 * heads * classes]
    batch, classes, channels = 10**7, 96, 128  # maps of one pixel
    device("row_offsets", torch.tensor([batch, classes, 1, 1, channels]), batch - 1, found)
    row = (batch - 1) * classes * channels
    assert found.tolist()[:3] == [row, 4 * row, row]


def test_reasons_are_named() -> None:
    def reason(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> str | None:
        return host.can_run(*draw(shape, dtype))

    assert reason(Shape(1, 2, 4, 4, 128, 4, 384)) is None
    assert "bfloat16 or all of float16" in str(reason(Shape(1, 1, 4, 4, 32, 1, 32), torch.float32))
    assert "multiples of 16, up to 256, got 24" in str(reason(Shape(1, 1, 4, 4, 24, 1, 32)))
    assert "got 272" in str(reason(Shape(1, 1, 4, 4, 272, 17, 32)))
    assert "multiples of 8, up to 64, got 12" in str(reason(Shape(1, 1, 4, 4, 48, 4, 32)))
    assert "got 128" in str(reason(Shape(1, 1, 4, 4, 128, 1, 32)))
    assert "units in multiples of 8, got 20" in str(reason(Shape(1, 1, 4, 4, 32, 1, 20)))
    arguments = draw(Shape(1, 1, 4, 4, 32, 1, 32), torch.bfloat16)
    assert "got torch.float16" in str(host.can_run(*arguments[:2], arguments[2].half(), *arguments[3:]))


SEEN = "row >= first[half] && row < first[half] + count"
BREAKS = {
    "keys of other pixels": (SOURCE, SEEN, "row >= 0"),
    "a barrier too few between queries and keys": (
        SOURCE,
        "    __syncthreads();\n    Head<kHead> key, value;",
        "    Head<kHead> key, value;",
    ),
    "no barrier between stages": attention.NO_BARRIER,
    "a maximum that may be infinite": (
        attention.HEADS,
        "float top = -FLT_MAX;  // finite, since a row may see none of these keys",
        "float top = highest[half] = -INFINITY;",
    ),
    "mixture not rescaled": attention.NOT_RESCALED,
    "guidance of the first image": (SOURCE, "int64_t(at / p.area()) * p.channels;", "at / p.area() % 7 * p.channels;"),
}


def check_all(device: Any) -> None:
    check(device, Shape(2, 7, 5, 7, 32, 2, 40), torch.bfloat16, drop=True, seed=1)
    check(device, Shape(1, 40, 2, 4, 32, 1, 24), torch.bfloat16, seed=2)
    check(device, Shape(1, 97, 2, 2, 32, 4, 24), torch.bfloat16, seed=3)


def test_the_whole_kernel_holds(device: Any) -> None:
    check_all(device)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(emulate: Emulate, name: str) -> None:
    attention.assert_broken(emulate, "class_attention", BREAKS[name], check_all)
