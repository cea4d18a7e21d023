"""CPU backends made of BLAS calls: the reference's products, slab by slab, in memory that stays in cache."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from errseg.ops.contract import Backend


def backend(module: ModuleType, **options: Any) -> Backend:
    """The functions ``forward`` and ``backward`` of a module, with options of :class:`Backend`."""
    return Backend(forward=module.forward, backward=module.backward, can_run=_on_cpu, **options)


def _on_cpu(*args: Any) -> str | None:
    elsewhere = next((a.device.type for a in args if isinstance(a, Tensor) and a.device.type != "cpu"), None)
    return None if elsewhere is None else f"needs tensors on cpu, got {elsewhere}"
