"""What every op's tests share: which backends run here, gradients, and eager twins in published order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.ops import contract
from errseg.testing.samples import Sample

HALF = (torch.bfloat16, torch.float16)
GPU_BACKENDS = ("triton", "cuda")


def run_on(device: str, call: Callable[..., Any], op: contract.Op, *args: Any, backend: str | None) -> Any:
    """``call(op, ...)`` on ``device``, results on the CPU; skips the test where the backend refuses the arguments."""
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    reason = op.why_not(backend, *moved) if backend else None
    if reason is not None and reason != contract.INTERPRETED:
        pytest.skip(f"{op.name} on {backend}: {reason}")
    result = call(op, *moved, backend=backend)
    return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()


def on_backends(op: str, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test on every backend of ``op`` that runs on this machine, but for those in ``without``."""
    running = [b for b, why in ops.backends()[op].items() if why in (None, "interpreted")]
    return pytest.mark.parametrize("backend", [b for b in running if b not in without])


def interpreted(op: str, backend: str) -> bool:
    """Whether a backend is so slow here that a test should take the smallest size that still tells."""
    return ops.OPS[op].why_not(backend) == "interpreted"


def exact_embeddings(batch: int, words: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixels [B, 16, H, W] and words [T, 16] whose cosines are exact in every order of summation, and tie often."""
    return torch.randint(-2, 3, (batch, 16, height, width)).float(), torch.randint(0, 2, (words, 16)).float() * 2 - 1


def words_far_apart(folder: Path) -> Tensor:
    """[140, 16] bfloat16, whose rows are 2^24 numbers apart in a file that is nearly all hole."""
    size = 140 << 24
    with open(folder / "sparse", "wb") as file:
        file.truncate(2 * size)
    words = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    words = words.as_strided((140, 16), (1 << 24, 1))
    return words.copy_(torch.randn(140, 16))


def gradients(call: Callable[[Sample], Any], sample: Sample) -> list[Tensor]:
    """Gradients of a fixed random functional of the result with respect to every floating tensor of the call."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in sample.leaves()]
    result = call(sample.with_leaves(iter(leaves)))
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cotangent = cotangent.bfloat16()  # the same in every dtype
    return list(torch.autograd.grad(result, leaves, cotangent.to(result), allow_unused=True))


def gradcheck(sample: Sample, backend: str) -> None:
    """Numerical against analytical gradients, float64, for every floating tensor of the call."""

    def call(*leaves: Tensor) -> Any:
        return sample.with_leaves(iter(leaves))(backend=backend)

    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in sample.leaves()], fast_mode=True)
