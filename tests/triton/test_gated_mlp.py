"""The gated MLP's kernels beyond the op tests: every shipped tile, slabs, memory, what ``needed`` leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing import (
    AllocationSpy,
    assert_absolutely_close,
    assert_close,
    assert_within_eager_error,
    poisoned_memory,
)
from errseg.testing.samples import Sample, Sizes, sample

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"
SMALL = Sizes(batch=1, classes=3, height=3, width=5, channels=24, hidden=40)
NAMES = "x", *ops.FoldedGatedMLP._fields


def kernels() -> Any:
    return triton_backend._kernels("gated_mlp")


def drawn(sizes: Sizes = SMALL, dtype: torch.dtype = torch.float32) -> Sample:
    return sample("gated_mlp", sizes).to(dtype).map(lambda t: t.to(DEVICE))


def leaves_of(call: Sample) -> list[Tensor]:
    x, *weights, _eps = call.raw_arguments()
    return [t.detach().requires_grad_() for t in (x, *weights)]


def run(leaves: list[Tensor], backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result and the gradient of every leaf, for a cotangent that bfloat16 holds."""
    with poisoned_memory():
        result = ops.gated_mlp(leaves[0], ops.FoldedGatedMLP(*leaves[1:]), backend=backend)
        cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        return result, torch.autograd.grad(result, leaves, cotangent.to(result))


def raw_backward(leaves: list[Tensor], needed: list[bool]) -> list[Tensor]:
    arguments = [t.detach() for t in leaves]
    with poisoned_memory():
        return kernels().backward(torch.ones_like(arguments[0]), *arguments, 1e-5, needed)


def test_opcheck() -> None:
    x, *weights, eps = drawn().raw_arguments()
    weights = [w.detach().requires_grad_() for w in weights]
    torch.library.opcheck(ops.OPS["gated_mlp"].overload, (x.requires_grad_(), *weights, eps, "triton"))


def test_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    triton_backend._find_out.cache_clear()
    leaves = leaves_of(drawn())

    def call(*leaves: Tensor) -> Tensor:
        return ops.gated_mlp(leaves[0], ops.FoldedGatedMLP(*leaves[1:]), backend="triton").square().sum()

    results = [
        torch.autograd.grad(f(*leaves), leaves)
        for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager"))
    ]
    for compiled, eager in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [40, 72, 136])
def test_every_shipped_tile(channels: int, dtype: torch.dtype) -> None:
    """Channels that fill no tile, hidden units that fill no chunk, in the tiles for 64, 128 and 256 channels."""
    call = drawn(Sizes(batch=1, classes=3, height=2, width=5, channels=channels, hidden=72), dtype)
    exact = run(leaves_of(call.to(torch.float64)), "reference")
    got, eager = run(leaves_of(call), "triton"), run(leaves_of(call), "reference")
    if dtype == torch.float64:
        assert_close(got[0], exact[0], 1e-13)
        for name, actual, expected in zip(NAMES, got[1], exact[1], strict=True):
            assert_close(actual, expected, 1e-12, name)
    else:
        assert_within_eager_error(got[0], eager[0], exact[0])
        for name, *found in zip(NAMES, got[1], eager[1], exact[1], strict=True):
            assert_within_eager_error(*found, name=name)


@pytest.mark.parametrize(("channels", "hidden"), [(1, 1), (2, 3), (64, 16)])
def test_smallest_widths(channels: int, hidden: int) -> None:
    call = drawn(replace(SMALL, channels=channels, hidden=hidden), torch.float64)
    exact, got = (run(leaves_of(call), backend) for backend in ("reference", "triton"))
    assert_close(got[0], exact[0], 1e-13)
    for name, actual, expected in zip(NAMES, got[1], exact[1], strict=True):
        assert_absolutely_close(actual, expected, 1e-12 * max(1.0, expected.abs().max().item()), name)


def test_nan_is_not_hidden_by_the_gate() -> None:
    leaves = leaves_of(drawn())
    with torch.no_grad():
        leaves[2][0] = float("nan")  # the bias of one gate
    result, grads = run(leaves, "triton")
    wanted, expected = run(leaves, "reference")
    assert result.isnan().all() and wanted.isnan().all()
    assert [g.isnan().any() for g in grads] == [g.isnan().any() for g in expected]


@pytest.mark.parametrize("channels", [257, 512])
def test_too_many_channels_are_named(channels: int) -> None:
    with pytest.raises(ops.BackendError, match=f"up to 256 channels, got {channels}"):
        drawn(Sizes(channels=channels))(backend="triton")


def test_views_and_their_gradients() -> None:
    wanted = run(leaves_of(drawn()), "triton")
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in leaves_of(drawn())]
    got = run(strided, "triton")
    for actual, expected in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        assert torch.equal(actual, expected)
    turned = leaves_of(drawn())
    turned[0] = turned[0].detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    assert not turned[0].is_contiguous()
    assert torch.equal(run(turned, "triton")[1][0], wanted[1][0])


def test_no_tokens_give_zero_gradients() -> None:
    result, grads = run(leaves_of(drawn(Sizes(batch=0))), "triton")
    assert result.shape == (0, 5, 7, 9, 16)
    assert all((grad == 0).all() for grad in grads) and grads[0].shape == result.shape


def test_slabs_add_up_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = leaves_of(drawn(Sizes(batch=1, classes=5, height=9, width=9, channels=16, hidden=24)))
    whole = raw_backward(leaves, [True] * 7)
    hidden, channels = 32, 16  # as padded
    token = 4 * (channels + 3 * hidden)
    monkeypatch.setattr(kernels(), "SLAB_BYTES", 150 * token)  # 128 of 405 tokens: 7 blocks of 64 in 4 slabs
    with AllocationSpy() as spy:
        parts = raw_backward(leaves, [True] * 7)
    assert torch.equal(parts[0], whole[0])
    for name, part, other in zip(NAMES, parts, whole, strict=True):
        assert_close(part, other, 1e-5, name)
    scratch = {a.shape: a.nbytes for a in spy.allocations if a.shape[:1] == (128,)}
    assert set(scratch) == {(128, channels), (128, 2 * hidden), (128, hidden)}
    assert sum(scratch.values()) <= kernels().SLAB_BYTES


@pytest.mark.parametrize(
    ("num_tokens", "block", "slab"),
    [(0, 64, 64), (1, 64, 64), (64, 64, 64), (65, 64, 128), (640, 64, 640), (641, 64, 384), (2000, 64, 512)],
)
def test_slabs_are_whole_blocks_of_even_size(
    num_tokens: int, block: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels(), "SLAB_BYTES", 10 * 64 * 100 + 99)  # 10 blocks of rows of 100 bytes
    assert kernels()._slab(num_tokens, 100, block) == slab


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2, 4), (3,), (5,), (6,), (0, 5), (1, 2, 3, 4)])
def test_what_is_not_needed_is_not_made(wanted: tuple[int, ...]) -> None:
    leaves = leaves_of(drawn(replace(SMALL, classes=5)))
    full = raw_backward(leaves, [True] * 7)
    with AllocationSpy() as spy:
        some = raw_backward(leaves, [i in wanted for i in range(7)])
    for i in wanted:
        assert torch.equal(some[i], full[i])
    shapes = {a.shape for a in spy.allocations}
    hidden, tokens = 48, 128  # as padded
    assert ((tokens, 2 * hidden) in shapes) == bool({1, 2, 3, 4} & set(wanted))
    assert ((tokens, hidden) in shapes) == (5 in wanted)


def test_float32_is_multiplied_in_three_tf32_products() -> None:
    """The interpreter computes tf32 as float32, so that no result could show a wrong choice here."""
    for name, config in kernels().CONFIGS.items():
        assert config.constants["PRECISION"] == ("tf32x3" if "float32" in name else "ieee")


def test_epsilon_reaches_the_kernel_in_full() -> None:
    call = drawn(dtype=torch.float64)
    x, params = call.args
    for eps in (1e-5, 0.3):
        results = [ops.gated_mlp(x * 1e-3, params, eps=eps, backend=name) for name in ("triton", "reference")]
        assert_close(*results, 1e-13)
