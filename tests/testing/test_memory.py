"""The spies see what they should: inside custom ops, in backward, and in inference mode too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.testing.memory import (
    AllocationSpy,
    assert_no_allocation_larger_than,
    current_rss,
    forbid_host_syncs,
    measure_peak_memory,
    peak_rss,
)

MIB = 1 << 20
FLOATS = MIB // 4  # in one MiB


@pytest.fixture
def wasteful() -> Iterator[Callable[[Tensor], Tensor]]:
    """A custom op that makes a MiB of scratch, and one more in its backward."""
    with torch.library._scoped_library("errseg_spy_test", "FRAGMENT") as library:
        library.define("wasteful(Tensor x) -> Tensor")

        def forward(x: Tensor) -> Tensor:
            return x + torch.empty(FLOATS).fill_(1.0)[0]

        def backward(context: object, gradient: Tensor) -> Tensor:
            return gradient + torch.zeros(FLOATS)[0]

        library.impl("wasteful", forward, "CompositeExplicitAutograd")
        torch.library.register_autograd("errseg_spy_test::wasteful", backward, lib=library)
        yield torch.ops.errseg_spy_test.wasteful.default


def test_peak_counts_what_lives_at_once() -> None:
    before = torch.ones(8 * FLOATS)
    with AllocationSpy() as spy:
        one = before[:FLOATS] * 1
        two = torch.cat([one, one])
        del one
        three = torch.zeros(FLOATS)
        three.add_(1)  # in place and views make nothing
        three.view(2, -1).t()
    assert [allocation.nbytes for allocation in spy.allocations] == [MIB, 2 * MIB, MIB]
    assert (spy.peak_bytes, spy.total_bytes) == (3 * MIB, 4 * MIB)
    assert spy.largest is not None
    assert (spy.largest.op, spy.largest.shape) == ("aten.cat.default", (2 * FLOATS,))
    assert spy.live_bytes == 3 * MIB
    del two, three
    assert spy.live_bytes == 0


def test_no_allocation_no_peak() -> None:
    with AllocationSpy() as spy:
        pass
    assert (spy.largest, spy.peak_bytes, spy.live_bytes) == (None, 0, 0)


def test_limit_names_the_culprit() -> None:
    x = torch.ones(FLOATS)
    with assert_no_allocation_larger_than(MIB) as spy:
        x * 2
    assert spy.peak_bytes == MIB
    with (
        pytest.raises(AssertionError, match=r"aten.mul.Tensor made 1,048,576 bytes, shape \[262144\]; allowed"),
        assert_no_allocation_larger_than(MIB - 1),
    ):
        x * 2


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode])
def test_scratch_inside_custom_ops_is_seen(wasteful, context) -> None:
    x = torch.ones(3)
    with context(), AllocationSpy() as spy:
        wasteful(x)
    assert spy.largest is not None
    assert spy.largest.nbytes == MIB
    assert spy.peak_bytes < MIB + 100


def test_backward_is_seen(wasteful) -> None:
    x = torch.ones(3, requires_grad=True)
    y = wasteful(x).sum()
    with AllocationSpy() as spy:
        y.backward()
    assert spy.largest is not None
    assert (spy.largest.op, spy.largest.nbytes) == ("aten.zeros.default", MIB)


def test_composite_ops_are_taken_apart_in_inference_mode() -> None:
    with torch.inference_mode(), AllocationSpy() as spy:
        torch.einsum("ab,cb->ac", torch.ones(3, 4), torch.ones(5, 4))
    assert [allocation.shape for allocation in spy.allocations][:2] == [(3, 4), (5, 4)]
    assert "aten.bmm.default" in {allocation.op for allocation in spy.allocations}


SYNCS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "int": lambda x: int(x[0]),
    "range": lambda x: range(x.long()[0]),
    "slice": lambda x: x[: x.long()[0]],
    "format": lambda x: f"{x[0]:.1f}",
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "assign": lambda x: x.clone().__setitem__(x > 0, torch.ones(3)),
    "select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: torch.bincount(x.long()),
    "repeat": lambda x: torch.repeat_interleave(x.long()),
}
NO_SYNCS = {
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(),
    "index": lambda x: x[torch.tensor([0, 2])],
    "put": lambda x: x.clone().index_put_((torch.tensor([0]),), torch.ones(1)),
    "fill": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "scatter": lambda x: torch.zeros(5).scatter_add_(0, x.long(), x),
    "static": lambda x: torch.nonzero_static(x, size=2),
    "normalize": lambda x: F.normalize(x, dim=0),
    "shape": lambda x: x.new_zeros(x.shape[0] + len(x)),
    "cast": lambda x: x.to(torch.float64),
}


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize("name", SYNCS)
def test_syncs_are_caught(name: str, context) -> None:
    with context(), pytest.raises(AssertionError, match="host sync"), forbid_host_syncs():
        SYNCS[name](torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize("name", NO_SYNCS)
def test_what_does_not_sync_passes(name: str, context) -> None:
    with context(), forbid_host_syncs():
        NO_SYNCS[name](torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("sync", ["item", "tolist", "nonzero"])
def test_syncs_inside_custom_ops_are_caught(sync: str) -> None:
    with torch.library._scoped_library("errseg_sync_test", "FRAGMENT") as library:
        library.define("waiting(Tensor x) -> Tensor")

        def forward(x: Tensor) -> Tensor:
            SYNCS[sync](x)
            return x * 1

        library.impl("waiting", forward, "CompositeExplicitAutograd")
        with pytest.raises(AssertionError, match="host sync"), forbid_host_syncs():
            torch.ops.errseg_sync_test.waiting(torch.ones(3))


def test_measured_process() -> None:
    measured = measure_peak_memory(
        "scale = 300; kept = bytearray(40 << 20); gone = bytes(400 << 20); del gone",
        "print('hello'); block = bytearray(b'x') * (scale << 20); del block",
    )
    assert measured.stdout == "hello"
    assert measured.extra >= 290 * MIB
    if measured.exact:
        assert measured.extra < 330 * MIB


def test_a_measured_process_that_fails_says_why() -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        measure_peak_memory("", "1 / 0")


def test_resident_memory_of_this_process() -> None:
    assert 10 * MIB < current_rss() <= peak_rss()
