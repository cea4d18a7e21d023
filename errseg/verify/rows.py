"""What a run hands back: one row per case, with its checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from errseg.verify.checks import Check

PASSED, FAILED, NOT_RUN = "pass", "fail", "not run"


@dataclass(frozen=True)
class Row:
    """The verdict on one case: an op, a backend, a dtype and a shape, or one golden or official comparison."""

    op: str
    backend: str
    dtype: str
    case: str
    checks: tuple[Check, ...] = ()
    reason: str = ""  # why it did not run, or the exception that ended it
    interpreted: bool = False
    device: str = "cpu"
    seconds: float = 0.0
    crashed: bool = field(default=False, repr=False)

    @property
    def status(self) -> str:
        """ "pass", "fail" or "not run"; a row without a check has proved nothing."""
        if self.crashed:
            return FAILED
        if not self.checks:
            return NOT_RUN
        return PASSED if all(check.passed for check in self.checks) else FAILED

    @property
    def worst(self) -> Check | None:
        """The check nearest to its limit, or farthest beyond it."""
        return max(self.checks, key=lambda check: check.severity, default=None)

    @property
    def label(self) -> str:
        """The backend as a table names it."""
        return f"{self.backend} (interpreted)" if self.interpreted else self.backend

    @property
    def name(self) -> str:
        """Op, backend, dtype and case in one line."""
        return f"{self.op} {self.label} {self.dtype}: {self.case}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that JSON lacks become None."""
        fields = ("op", "backend", "dtype", "case", "status", "reason", "interpreted", "device")
        return {
            "kind": "row",
            **{name: getattr(self, name) for name in fields},
            "seconds": round(self.seconds, 4),
            "checks": [
                {
                    "quantity": check.quantity,
                    "measure": check.measure,
                    "error": _finite(check.error),
                    "allowed": _finite(check.allowed),
                    "eager": _finite(check.eager),
                    "note": check.note,
                    "passed": check.passed,
                }
                for check in self.checks
            ],
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def succeeded(rows: list[Row]) -> bool:
    """Whether nothing failed and something was executed."""
    return any(row.status == PASSED for row in rows) and not any(row.status == FAILED for row in rows)


Task = tuple[str, Callable[[], list[Row]]]
"""What is done, in words, and how: one case, in every dtype and on every backend."""
