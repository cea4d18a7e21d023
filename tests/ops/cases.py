"""What every op's tests share: which backends run here, gradients, and eager twins in published order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.testing.samples import Sample

HALF = (torch.bfloat16, torch.float16)


def on_backends(op: str, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test on every backend of ``op`` that runs on this machine, but for those in ``without``."""
    running = [b for b, why in ops.backends()[op].items() if why in (None, "interpreted")]
    return pytest.mark.parametrize("backend", [b for b in running if b not in without])


def interpreted(op: str, backend: str) -> bool:
    """Whether a backend is so slow here that a test should take the smallest size that still tells."""
    return ops.OPS[op].why_not(backend) == "interpreted"


def gradients(call: Callable[[Sample], Any], sample: Sample) -> list[Tensor]:
    """Gradients of a fixed random functional of the result with respect to every floating tensor of the call."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in sample.leaves()]
    result = call(sample.with_leaves(iter(leaves)))
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(result, leaves, cotangent.to(result.dtype), allow_unused=True))


def gradcheck(sample: Sample, backend: str) -> None:
    """Numerical against analytical gradients, float64, for every floating tensor of the call."""

    def call(*leaves: Tensor) -> Any:
        return sample.with_leaves(iter(leaves))(backend=backend)

    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in sample.leaves()], fast_mode=True)
