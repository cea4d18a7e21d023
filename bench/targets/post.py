"""Logits to labels, at the sizes of real pictures: the op `upsample_argmax` as `Segmenter` calls it."""

from __future__ import annotations

from dataclasses import replace

from errseg.bench.cases import Case, vary
from errseg.bench.targets import upsample_argmax
from errseg.bench.targets._ops import SMALL, T_AXIS

B = Case(output=(512, 683))
L = Case(model="l", size=768, output=(512, 683))

TARGET = replace(
    upsample_argmax.TARGET,
    name="post",
    cases=(B, L),
    quick=replace(SMALL, output=(77, 103)),
    sweeps=vary(B, words=T_AXIS, classes=(16, 24, 32), batch=(2, 4, 8)),
    bars=(),
)
