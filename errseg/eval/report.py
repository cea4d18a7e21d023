"""An evaluation as files: scores, classes, and the matrix behind them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import errseg
from errseg.configs.schema import EvalConfig
from errseg.data.labels import replacing, save_json
from errseg.eval.runner import Evaluation

RESULT, CLASSES, CONFUSION = "result.json", "classes.tsv", "confusion.safetensors"


def write(evaluation: Evaluation, config: EvalConfig, out: Path) -> None:
    """Write `result.json`, `classes.tsv` and `confusion.safetensors`, each whole or not at all."""
    from safetensors.numpy import save

    names = {"classes": json.dumps(evaluation.data.classes), "rows": "truth", "columns": "prediction"}
    with replacing(out / CONFUSION) as temporary:
        temporary.write_bytes(save({"confusion": np.ascontiguousarray(evaluation.metrics.confusion)}, names))
    rows = class_rows(evaluation)
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    with replacing(out / CLASSES) as temporary:
        temporary.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    save_json(facts(evaluation, config), out / RESULT)


def facts(evaluation: Evaluation, config: EvalConfig) -> dict[str, Any]:
    """Scores in percent (None where nothing is to score), settings and versions as JSON values."""
    return {
        "set": evaluation.data.name,
        "pictures": evaluation.pictures,
        "skipped": evaluation.skipped,
        "metrics": {name: _finite(value) for name, value in evaluation.metrics.summary().items()},
        "published_miou": config.eval.published_miou,
        "classes": class_rows(evaluation),
        "settings": evaluation.settings,
        "config": asdict(config),
        "versions": {"errseg": errseg.__version__}
        | {name: metadata.version(name) for name in ("torch", "torchmetrics", "Pillow")},
    }


def class_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Per class its index, name, IoU and accuracy in percent (None: occurs nowhere), and its pixels."""
    metrics = evaluation.metrics
    return [
        {
            "index": index,
            "name": name,
            "iou": _finite(metrics.iou[index]),
            "accuracy": _finite(metrics.accuracy[index]),
            "true_pixels": int(metrics.true[index]),
            "predicted_pixels": int(metrics.predicted[index]),
        }
        for index, name in enumerate(evaluation.data.classes)
    ]


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
