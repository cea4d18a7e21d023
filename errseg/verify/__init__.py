"""Numerical equivalence of every op on every backend, of the model with golden numbers, and with the published code."""

from __future__ import annotations

from errseg.verify.checks import Check
from errseg.verify.rows import Row, succeeded
from errseg.verify.runner import run

__all__ = ["Check", "Row", "run", "succeeded"]
