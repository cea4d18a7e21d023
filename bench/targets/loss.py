"""Logits and targets to the loss and its gradient, as in a training step: the op `upsample_bce` at B = 1 and 4."""

from __future__ import annotations

from dataclasses import replace

from errseg.bench.cases import vary
from errseg.bench.targets import upsample_bce
from errseg.bench.targets._ops import SMALL, TRAIN

TARGET = replace(
    upsample_bce.TARGET,
    name="loss",
    cases=(TRAIN, replace(TRAIN, batch=4)),
    quick=SMALL,
    sweeps=vary(TRAIN, batch=(2, 8), words=(59, 459, 847)),
    passes=("both",),
    bars=(),
)
