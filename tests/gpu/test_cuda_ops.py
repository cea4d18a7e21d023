"""On a GPU: the CUDA kernels through the public ops, by the rule of `errseg verify`, values and gradients.

This alone executes the launchers (csrc/*/*_cuda.cu) on odd sizes and views: without a GPU they are compiled, linked and
loaded (tests/cuda/test_ptxas.py), and what they launch is emulated (tests/cuda).
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errseg import ops
from errseg.ops import native_build
from errseg.testing.samples import Sizes, sample
from errseg.verify.cases import WITH_DROP_PATH, Case
from errseg.verify.runner import exact_arithmetic, run_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

OPS = [name for name, op in ops.OPS.items() if "cuda" in op.backends]
ONE = Sizes(batch=2, classes=1, words=101, height=5, width=7, channels=128, heads=4, hidden=384, embed=32, text=64)
SIZES = {"one class": ONE, "97 classes": replace(ONE, batch=1, classes=97)}
REFUSED = Path(__file__).parents[1] / "cuda/drivers/refused.cu"


@pytest.mark.parametrize("view", [None, "strided", "transposed"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_kernels_give_what_the_reference_gives(op: str, sizes: str, view: str | None) -> None:
    case = Case(op, sizes, SIZES[sizes], view=view, drop_path=op in WITH_DROP_PATH)
    with exact_arithmetic():
        rows = run_case(case, ["cuda"], torch.device("cuda"))
    assert not [f"{row.name}: {row.reason or row.worst}" for row in rows if row.status == "fail"]
    assert any(row.status == "pass" for row in rows), [row.reason for row in rows]


def test_maps_of_four_axes_are_refused() -> None:
    call = sample("spatial_attention").to(torch.bfloat16).map(lambda tensor: tensor.cuda())
    call(backend="cuda")  # loads the library
    x = torch.zeros(2, 4, 4, 32, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match=r"expected x \[B, K, H, W, C\], got \[2, 4, 4, 32\]"):
        torch.ops.errseg.spatial_attention_cuda_attend(*[x] * 7, None, 1, 2, 1e-5, False)


def test_a_refused_launch_leaves_no_error_behind(tmp_path: Path) -> None:
    nvcc, made = str(native_build.cuda_home() / "bin/nvcc"), str(tmp_path / "refused")
    flags = "-std=c++20", "-arch=native", f"-I{native_build.source_root()}"
    subprocess.run([nvcc, *flags, str(REFUSED), "-o", made], check=True)
    assert subprocess.run([made], check=False).returncode == 0
