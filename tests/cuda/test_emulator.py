"""The emulator itself: fragment layouts, collectives, schedules, and faults that it must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated import TYPES, EmulatorFault

Emulate = Callable[..., Any]
NONE, NO_BARRIER, DIVERGENT, EARLY_EXIT, MIXED, MISSING_LANE, TOO_FAR, UNALIGNED, UNWAITED, EARLY_READ = range(10)
SEEDS = range(6)


@pytest.fixture(scope="module")
def device(emulate: Emulate) -> Any:
    return emulate("emulator")


def registers(pairs: Tensor) -> Tensor:
    """[..., 2] 16-bit numbers -> [...] registers, the first one below."""
    return pairs.contiguous().view(torch.int32).squeeze(-1)


# ---- tensor cores. The fragments are spelled as in the PTX manual, "Matrix Fragments for mma.m16n8k16".


def fragments_of_a(a: Tensor) -> Tensor:
    """[16, 16] -> [32, 4] registers."""
    result = a.new_empty((32, 8))
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
            result[lane, i] = a[row, column]
    return registers(result.view(32, 4, 2))


def fragments_of_b(b: Tensor) -> Tensor:
    """[16, 8] -> [32, 2] registers."""
    result = b.new_empty((32, 4))
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
            result[lane, i] = b[row, group]
    return registers(result.view(32, 2, 2))


def matrix_of_d(d: Tensor) -> Tensor:
    """[32, 4] -> [16, 8]."""
    result = d.new_empty((16, 8))
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            result[group if i < 2 else group + 8, thread * 2 + (i & 1)] = d[lane, i]
    return result


def multiply(device: Any, a: Tensor, b: Tensor, seed: int = 0) -> Tensor:
    d = torch.zeros(32, 4)
    device("mma", seed, TYPES[a.dtype], fragments_of_a(a), fragments_of_b(b), d)
    return matrix_of_d(d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_places_every_element(device: Any, dtype: torch.dtype) -> None:
    right = torch.arange(128).view(16, 8).to(dtype)  # distinct and exact
    for row in range(16):
        for k in range(16):
            left = torch.zeros(16, 16, dtype=dtype)
            left[row, k] = 1
            wanted = torch.zeros(16, 8)
            wanted[row] = right[k].float()
            assert torch.equal(multiply(device, left, right), wanted), (row, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_is_the_matrix_product(device: Any, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        left, right = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
        wanted = left.double() @ right.double()
        assert (multiply(device, left, right, seed) - wanted).abs().max() < 16 * 2.0**-23 * wanted.abs().max()


def test_mma_adds_to_its_sums(device: Any) -> None:
    one = torch.eye(16, dtype=torch.float16)
    d = torch.full((32, 4), 0.5)
    device("mma", 0, TYPES[one.dtype], fragments_of_a(one), fragments_of_b(one[:, :8].contiguous()), d)
    assert torch.equal(matrix_of_d(d), torch.eye(16, 8) + 0.5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(device: Any, count: int, transposed: bool) -> None:
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    result = torch.full((32, count), -1, dtype=torch.int32)
    device("load_matrices", 3, count, transposed, matrices, result)
    seen = matrices.mT if transposed else matrices
    for lane in range(32):  # row lane / 4, the pair at column 2 (lane % 4)
        wanted = registers(seen[:, lane // 4, lane % 4 * 2 :][:, :2])
        assert torch.equal(result[lane], wanted.view(count)), lane


def test_ldmatrix_feeds_mma(device: Any) -> None:
    left, right = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    result = torch.full((16, 8), float("nan"))
    device("product", 1, left, right, result)
    assert (result - left.double() @ right.double()).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits(device: Any, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).short().view(dtype).float()
    every = every[every.isfinite()]
    ties = (every.double() + every.roll(1).double()).div(2).float()
    near = torch.cat((every, ties, ties.nextafter(torch.tensor(torch.inf)), torch.randn(1000) * 1e-6))
    near = near[near.isfinite()].contiguous()
    result, back = near.to(dtype).fill_(0), torch.empty_like(near)
    device("round_to", TYPES[dtype], near, result, back, near.numel())
    assert torch.equal(result.view(torch.int16), near.to(dtype).view(torch.int16))
    assert torch.equal(back, result.float())


# ---- warps and blocks


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_collectives(device: Any, seed: int) -> None:
    values = torch.randint(100, (64,), dtype=torch.int32)
    result = torch.full((64, 9), -1, dtype=torch.int32)
    device("warps", seed, values, result)
    lanes = torch.arange(64)
    warp, lane, segment = lanes // 32 * 32, lanes % 32, lanes % 8
    total = values.view(2, 32).sum(1).repeat_interleave(32)
    ballot = ((values % 2).view(2, 32).long() << torch.arange(32)).sum(1).repeat_interleave(32)
    halves = values.view(2, 2, 16)
    wanted = [
        values[warp + 5],
        values[warp + (lane ^ 9)],
        values[torch.where(segment + 3 < 8, lanes + 3, lanes)],
        values[torch.where(segment >= 3, lanes - 3, lanes)],
        torch.where(ballot >= 2**31, ballot - 2**32, ballot),
        total,
        total,
        torch.stack((halves[:, 0].amax(1), halves[:, 1].amin(1)), 1).flatten().repeat_interleave(16),
        (values % 3 == 0).sum().expand(64),
    ]
    for column, values_of_column in enumerate(wanted):
        assert torch.equal(result[:, column], values_of_column.int()), column


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(device: Any, seed: int) -> None:
    values = torch.randint(7, (1000,), dtype=torch.int32)
    result = torch.zeros(7, dtype=torch.int32)
    device("histogram", seed, values, 1000, result)
    assert torch.equal(result, values.bincount(minlength=7).int())


def reverse(device: Any, bug: int, seed: int = 0) -> Tensor:
    result = torch.full((2, 96), -1, dtype=torch.int32)
    device("reverse", seed, torch.arange(96, dtype=torch.int32), result, bug)
    return result


def test_a_right_kernel_passes_under_every_schedule(device: Any) -> None:
    wanted = torch.arange(95, -1, -1, dtype=torch.int32).expand(2, 96)
    for seed in range(50):
        assert torch.equal(reverse(device, NONE, seed), wanted)


def test_a_missing_barrier_shows_as_poison(device: Any) -> None:
    wanted = torch.arange(95, -1, -1, dtype=torch.int32).expand(2, 96)
    wrong = [result for seed in range(5) if not torch.equal(result := reverse(device, NO_BARRIER, seed), wanted)]
    assert len(wrong) == 5
    assert all((result == -1).any() for result in wrong)  # shared memory starts as 0xFF


@pytest.mark.parametrize(
    ("bug", "finding"),
    [
        (DIVERGENT, r"divergent barrier: __syncthreads \(line \d+\) and __syncthreads \(line \d+\)"),
        (EARLY_EXIT, "__syncthreads .* is not reached by every thread of the block"),
        (MIXED, "lanes of one warp meet in "),
        (MISSING_LANE, "__ballot_sync .*(left the kernel|not reached by every lane)"),
        (UNALIGNED, "ldmatrix: a row is not aligned to 16 bytes"),
    ],
)
def test_faults_are_found(device: Any, bug: int, finding: str) -> None:
    for seed in SEEDS:
        with pytest.raises(EmulatorFault, match=finding):
            reverse(device, bug, seed)
    assert reverse(device, NONE)[0, 0] == 95  # and the machine works on


def test_asynchronous_copies_arrive_when_waited_for(device: Any) -> None:
    values, wanted = torch.arange(96, dtype=torch.int32), torch.arange(95, -1, -1, dtype=torch.int32)
    result = torch.zeros_like(values)
    device("copy", 1, values, result, NONE)
    assert torch.equal(result, wanted)
    device("copy", 1, values, result, EARLY_READ)
    assert (result == -1).any()
    with pytest.raises(EmulatorFault, match="asynchronous copy that nobody waited for"):
        device("copy", 1, values, result, UNWAITED)


def test_limits_of_a_launch(device: Any) -> None:
    for blocks, threads, shared_bytes, finding in (
        (1, 1025, 0, "1025 threads"),
        (65536, 32, 0, "65536 x 1 blocks"),
        (1, 32, 228 << 10, "bytes of shared memory"),
    ):
        with pytest.raises(EmulatorFault, match=finding):
            device("refused", blocks, threads, shared_bytes)


def test_address_sanitizer_sees_shared_memory(emulate: Emulate) -> None:
    sanitized = emulate("emulator", sanitized=True)
    assert reverse(sanitized, NONE, 1)[1, 0] == 95
    with pytest.raises(EmulatorFault, match="heap-buffer-overflow"):
        reverse(sanitized, TOO_FAR, 1)
    with pytest.raises(EmulatorFault, match="divergent barrier"):
        reverse(sanitized, DIVERGENT, 1)
