"""On a machine with a GPU the same tests reach the backends that live there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errseg.ops import contract
from tests.ops.cases import GPU_BACKENDS, run_on


@pytest.fixture(autouse=True)
def _on_its_own_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the arguments of GPU backends to the GPU, and their results back."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("backend") not in GPU_BACKENDS or not torch.cuda.is_available():
        return
    call = contract.Op.__call__

    def on_gpu(op: contract.Op, *args: Any, backend: str | None = None) -> Any:
        return run_on("cuda" if backend in GPU_BACKENDS else "cpu", call, op, *args, backend=backend)

    monkeypatch.setattr(contract.Op, "__call__", on_gpu)
