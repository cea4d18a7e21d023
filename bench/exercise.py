"""Every op of one backend called once, forward and backward: what the sanitizer and the determinism check repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from errseg import ops
from errseg.testing.samples import Sample, Sizes, sample

ODD = Sizes(batch=2, classes=5, words=37, height=7, width=9)
MANY_BLOCKS = Sizes(batch=2, classes=19, words=301, height=34, width=38, channels=32, heads=4, hidden=96, text=72)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Exercise:
    """One call in one dtype on one device; `trains` says whether it has a backward pass."""

    op: str
    backend: str
    dtype: torch.dtype
    call: Sample
    trains: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.op} {self.backend} {str(self.dtype).removeprefix('torch.')}"

    def run(self) -> list[Tensor]:
        """Results, then gradients of the sum of the first one."""
        leaves = [leaf.detach().requires_grad_(self.trains) for leaf in self.call.leaves()]
        results = self.call.with_leaves(iter(leaves))(backend=self.backend)
        results = list(results) if isinstance(results, tuple) else [results]
        gradients: list[Tensor] = []
        if self.trains:
            found = torch.autograd.grad(results[0].float().sum(), leaves, allow_unused=True)
            gradients = [g for g in found if g is not None]
        return [t.detach() for t in (*results, *gradients)]


def exercises(backend: str, device: torch.device, sizes: Sizes) -> Iterator[Exercise]:
    """Every op that has this backend, in every dtype that it takes."""
    for op in ops.OPS.values():
        if op.why_not(backend) is not None:
            continue
        for dtype in DTYPES:
            call = sample(op.name, sizes).to(dtype).map(lambda t: t.to(device))
            if op.why_not(backend, *call.raw_arguments()) is None:
                registered = op.backends[backend]
                trains = backend == "reference" or registered.trains or registered.backward is not None
                yield Exercise(op.name, backend, dtype, call, bool(op.differentiable) and trains)
