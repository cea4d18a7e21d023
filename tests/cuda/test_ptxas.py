"""Every CUDA kernel compiles for every architecture without spills, and the library links and loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from errseg import ops
from errseg.ops import native_build
from tests.cuda import ptxas

KERNELS = {
    "upsample_argmax_tile_kernel": 4,  # types
    "upsample_argmax_direct_kernel": 4,
    "upsample_bce_kernel": 4,
    "upsample_bce_count_kernel": 4,
    "upsample_bce_loss_kernel": 4,
    "class_votes_kernel": 3,
    "class_votes_count_kernel": 1,
    "cost_volume_fwd_kernel": 3,
    "cost_volume_bwd_pixels_kernel": 3,
    "cost_volume_bwd_words_kernel": 3,
    "cost_volume_bwd_order_kernel": 1,
    "cost_volume_bwd_sum_kernel": 1,
    "depthwise_conv_kernel": 3,
    "depthwise_conv_gather_kernel": 3,
    "depthwise_conv_plain_kernel": 4,
    "depthwise_conv_plain_gather_kernel": 4,
    "depthwise_conv_reduce_kernel": 4,
    "class_attention_fwd_kernel": 4,  # types, channels
    "class_attention_bwd_mlp_kernel": 4,
    "class_attention_bwd_attention_kernel": 4,
    "class_attention_stream_fwd_kernel": 4,  # types, heads
    "class_attention_stream_bwd_queries_kernel": 4,
    "class_attention_stream_bwd_keys_kernel": 4,
    "spatial_attention_fwd_kernel": 8,  # types, channels, heads
    "spatial_attention_bwd_queries_kernel": 8,
    "spatial_attention_bwd_keys_kernel": 4,  # types, heads
    "spatial_attention_windows_kernel": 2,
    "spatial_attention_rows_kernel": 2,
    "spatial_attention_bwd_pixels_kernel": 2,
}


@pytest.fixture(scope="module")
def usage(kernel_cache: Path) -> list[ptxas.Usage]:
    try:
        return ptxas.compile_kernels(kernel_cache)
    except native_build.Unavailable as reason:
        pytest.skip(str(reason))


def test_no_kernel_spills(usage: list[ptxas.Usage]) -> None:
    print(ptxas.table(usage))  # noqa: T201
    assert {row.arch for row in usage} == {f"sm_{arch}" for arch in native_build.ARCHS}
    for name, types in KERNELS.items():
        rows = [row for row in usage if name in row.kernel]
        assert len(rows) == types * len(native_build.ARCHS), name
        for row in rows:
            assert row.stack == row.spill_stores == row.spill_loads == 0, row
    assert len(usage) == sum(KERNELS.values()) * len(native_build.ARCHS)


def test_the_parser_reads_spills() -> None:
    text = """ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90'
ptxas info    : Function properties for _Z1fPf
    40 bytes stack frame, 352 bytes spill stores, 340 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 192 bytes smem, 464 bytes cmem[0]
"""
    (row,) = ptxas.parse(text)
    assert (row.arch, row.registers, row.stack) == ("sm_90", 128, 40)
    assert (row.spill_stores, row.spill_loads, row.static_shared) == (352, 340, 192)


LOADS = """
import sys, torch
import errseg.ops
torch.ops.load_library(sys.argv[1])
for op in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"errseg::{op}", "CUDA"), op
"""
SPATIAL_ATTENTION = [f"spatial_attention_cuda_{n}" for n in ("attend", "attend_bwd", "windows", "pixels", "rows")]
CLASS_ATTENTION = [
    f"class_attention_cuda_{name}"
    for name in (
        "most_classes",
        "fwd",
        "mlp_fwd",
        "mlp_bwd",
        "mlp_rows_bwd",
        "attention_bwd",
        "stream_fwd",
        "stream_bwd",
    )
]


def test_the_library_links_and_loads(kernel_cache: Path) -> None:
    """With kernels that are hardly optimised where nvcc can leave that out: the test above compiles them in earnest."""
    try:
        home = native_build.cuda_home()
        native_build.check_cuda_version(home)
    except native_build.Unavailable as reason:
        pytest.skip(str(reason))
    major = int(native_build.nvcc_version(home).split(".")[0])
    fast = {"NVCC_APPEND_FLAGS": "--Ofast-compile=max"} if major > 12 else {}
    name = f"errseg_cuda-{torch.__version__}-{native_build.source_hash('cuda')}{'-fast' * len(fast)}"
    library = kernel_cache / f"{name}.so"
    if not library.is_file():
        folder = kernel_cache / f"build-{library.stem}"
        folder.mkdir(exist_ok=True)
        run(native_build.__file__, "cuda", str(folder), "90", **fast)
        (made,) = folder.glob("errseg_*.so")
        made.replace(library)
    whole = (name for name, op in ops.OPS.items() if "cuda" in op.backends and op.backends["cuda"].forward is None)
    run("-c", LOADS, str(library), *(f"{name}_cuda" for name in whole), *SPATIAL_ATTENTION, *CLASS_ATTENTION)


def run(*arguments: str, **variables: str) -> None:
    """Python in a process of its own, with the modules of this one."""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin", **variables}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
