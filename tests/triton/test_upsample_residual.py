"""Upsampling with a residual in Triton: compilation, and maps that its offsets do not reach."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing.samples import Sizes, sample

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"
OP = ops.OPS["upsample_residual"]


def test_opcheck() -> None:
    call = sample("upsample_residual", Sizes(batch=1, classes=2, height=5, width=4)).to(torch.float32)
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in call.raw_arguments()]
    torch.library.opcheck(OP.overload, (*leaves, "triton"))


def test_maps_of_2_to_the_31_numbers_are_refused() -> None:
    """The smaller map may be either of the two."""
    number = torch.zeros((), device=DEVICE)
    wide, small = number.expand(1, 1, 5000, 5000, 128), number.expand(1, 1, 3, 2, 128)
    for pair in ((wide, small), (small, wide)):
        reason = "maps of less than 2**31 numbers, got [1, 1, 5000, 5000, 128] float32"
        assert OP.why_not("triton", *pair) == reason
    assert OP.why_not("triton", small, small) == triton_backend.available()


def test_what_else_it_cannot_take_is_named() -> None:
    number = torch.zeros((), device=DEVICE)
    x, residual = number.expand(1, 1, 3, 2, 4), number.expand(1, 1, 6, 4, 4)
    assert "of one dtype, got [1, 1, 3, 2, 4] float32 and" in str(OP.why_not("triton", x, residual.half()))
    long = number.expand(1, 1, 1, 40_000, 4)
    assert OP.why_not("triton", long, residual) == "maps of up to 32767 pixels a side, got 40000"
