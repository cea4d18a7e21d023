"""Training with the fused operators goes the way of the published order of operations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from errseg.configs.schema import DataSettings, EvalConfig, EvalSettings
from errseg.eval.runner import evaluate
from errseg.train.settings import TrainConfig
from errseg.train.trainer import train
from tests.train.world import config, fresh_accelerate

STEPS = 16


def course(settings: TrainConfig, out: Path) -> tuple[NDArray[np.float64], float]:
    """The loss of every step, and mIoU in the end on the training pictures."""
    with fresh_accelerate():
        model = train(settings, out)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    scored = EvalConfig(
        DataSettings(folder=settings.data.folder),
        replace(settings.model, weights=str(model)),
        EvalSettings(device="cpu", workers=0, protocol="direct"),
    )
    result = evaluate(scored, out / "eval")
    assert result is not None and result.pictures == 5
    return np.array(losses), result.metrics.miou


def test_losses_and_scores_agree_within_the_spread_of_runs(scenes: Path, tmp_path: Path) -> None:
    base = config(scenes, steps=STEPS, lr=2e-3, save_every=STEPS)
    fused, fused_miou = course(base, tmp_path / "fused")
    published, published_miou = course(replace(base, train=replace(base.train, fused=False)), tmp_path / "published")
    other, other_miou = course(replace(base, train=replace(base.train, seed=1)), tmp_path / "another seed")
    assert len(fused) == STEPS and fused[-5:].mean() < 0.8 * fused[:5].mean()  # it learns
    spread, apart = np.abs(other - fused), np.abs(published - fused)
    assert apart.mean() < 0.1 * spread.mean() and apart.max() < spread.max()
    assert abs(published_miou - fused_miou) < max(abs(other_miou - fused_miou), 1.0)
    assert fused_miou > 10
