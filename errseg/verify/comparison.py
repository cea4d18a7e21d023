"""Every check of one row: results and gradients beside their yardstick."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from errseg.verify import checks
from errseg.verify.checks import Check, Leniency
from errseg.verify.yardstick import Outcome, Yardstick


@dataclasses.dataclass(frozen=True)
class Look:
    """The draws that eager runs beyond those of every backend, and what the backend answered on them."""

    draws: range = range(0)
    outcomes: dict[int, Outcome] = dataclasses.field(default_factory=dict)
    gates: bool = False


def compare(backend: str, got: list[Outcome], yardstick: Yardstick, look: Look | None = None) -> list[Check]:
    """Every check of one row; another look allows for luck in eager's errors and in gates at their kinks."""
    truth = yardstick.truth(0)
    found: list[Check] = []
    for name in truth.results:
        found += _compare_result(name, backend, [outcome.results[name] for outcome in got], yardstick, look)
    for draw, outcome in enumerate(got):
        kinks = yardstick.kinks(draw) if look and look.gates else {}
        for name in truth.gradients:
            leniency = _leniency(yardstick, backend, "gradients", name, look, kinks.get(name))
            found += _compare_gradient(name, backend, draw, outcome.gradients[name], yardstick, leniency)
    return found


def _leniency(
    yardstick: Yardstick, backend: str, kind: str, name: str, look: Look | None, kinks: Tensor | None = None
) -> Leniency:
    eager, results = [], []
    for draw in look.draws if look else ():
        beside, truth = (getattr(o, kind)[name] for o in (yardstick.eager(backend, draw), yardstick.truth(draw)))
        if beside is None or truth is None or beside.isnan().any():
            continue
        eager.append((beside, truth))
        mine = getattr(look.outcomes[draw], kind)[name] if look and draw in look.outcomes else None
        if mine is not None and mine.shape == truth.shape:
            results.append((mine, truth))
    return Leniency(tuple(eager), tuple(results), kinks)


def _compare_result(name: str, backend: str, got: list[Tensor], yardstick: Yardstick, look: Look | None) -> list[Check]:
    case = yardstick.case
    arguments = case.arrange(yardstick.call(0)).args
    eager = [yardstick.eager(backend, draw).results[name] for draw in range(len(got))]
    truth = [yardstick.truth(draw).results[name] for draw in range(len(got))]
    if case.op == "class_votes":
        return [checks.compare_votes(got[0], arguments[0], arguments[1])]
    if case.op == "select_classes":
        return [checks.compare_exactly("class ids", got[0], eager[0])]
    if name == "labels":
        expected = yardstick.published_in_float64().results[name] if backend == "reference" else truth[0]
        return [checks.compare_labels(got[0], expected, arguments[0], arguments[1], twins=backend != "reference")]
    if any(not isinstance(g, Tensor) or g.shape != t.shape for g, t in zip(got, truth, strict=True)):
        return [checks.failed(name, f"expected shape {list(truth[0].shape)}")]
    leniency = _leniency(yardstick, backend, "results", name, look if len(got) == 1 else None)
    usable = [_usable(e, t) for e, t in zip(eager, truth, strict=True)]
    scale = 1.0 if name == "scores" else 0.0  # probabilities that vanish are compared absolutely
    stacked = (torch.stack(group) for group in (got, usable, truth))
    return checks.compare_errors(name, *stacked, scale=scale, leniency=leniency)


def _usable(eager: Tensor, truth: Tensor) -> Tensor:
    """An eager result; the rounded truth where eager answers 0/0, as a mean over no pixels does."""
    undefined = eager.numel() > 0 and bool(eager.isnan().all()) and not bool(truth.isnan().any())
    return truth.to(eager.dtype) if undefined else eager


def _compare_gradient(
    name: str, backend: str, draw: int, got: Tensor | None, yardstick: Yardstick, leniency: Leniency
) -> list[Check]:
    quantity = f"grad {name}"
    siblings = yardstick.truth(draw).gradients
    exact, eager = siblings[name], yardstick.eager(backend, draw).gradients[name]
    if exact is None or eager is None:
        return [checks.failed(quantity, "a gradient where there should be none")] if got is not None else []
    if got is None:
        return [checks.failed(quantity, "no gradient")]
    scale = max(g.abs().max().item() if g is not None and g.numel() else 0.0 for g in siblings.values())
    # Gradients of folded parameters pass through a few more roundings than eager's, however small the case.
    roundings = 32 if got.dtype == torch.float32 else 4
    return checks.compare_errors(
        quantity, got, _usable(eager, exact), exact, scale=scale, roundings=roundings, leniency=leniency
    )
