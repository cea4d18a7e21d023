"""The C++ kernels as older processors run them: with vectors of 32 and of 16 bytes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from errseg import ops

OPS = "spatial_attention,gated_mlp,class_attention,depthwise_conv"


@pytest.mark.skipif(ops.backends()["gated_mlp"]["cpu"] is not None, reason="no C++ kernels here")
@pytest.mark.parametrize("vector_bytes", [32, 16])
def test_narrow_vectors_err_as_little(vector_bytes: int) -> None:
    """Forward and gradients, beside eager PyTorch, by the rule of `errseg verify`."""
    arguments = ["verify", "--quick", "--ops", OPS, "--backends", "cpu", "--only", "odd sizes", "--only", "past a tile"]
    run = subprocess.run(
        [sys.executable, "-m", "errseg", *arguments],
        env=os.environ | {"ERRSEG_VECTOR_BYTES": str(vector_bytes)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "24 passed, 0 failed" in run.stdout, run.stdout
