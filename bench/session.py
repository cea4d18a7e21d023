"""One invocation of `errseg bench`: what is asked for, the machine card, row after row into the results folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from errseg.bench.cases import PASSES, Case
from errseg.bench.clock import make_clock
from errseg.bench.machine import machine_card
from errseg.bench.precision import Precision
from errseg.bench.providers import default_names, find_provider
from errseg.bench.registry import Target, find_target, target_names
from errseg.bench.roofline import measure_ceilings
from errseg.bench.rows import FAILED, OK, Row, append_card, append_rows
from errseg.bench.runner import QUICK, Effort, Runner
from errseg.errors import ErrSegError


@dataclass(frozen=True)
class Request:
    """What to measure; empty sequences mean the defaults."""

    device: torch.device
    folder: Path
    targets: Sequence[str] = ()
    providers: Sequence[str] = ()
    passes: Sequence[str] = ()
    precisions: Sequence[Precision] = (Precision("float32"),)
    effort: Effort = field(default_factory=Effort)
    quick: bool = False
    sweep: bool = False
    official: Path | None = None

    def chosen(self) -> list[Target]:
        """The targets; raises ErrSegError for an unknown target, pass or provider before anything runs."""
        targets = [find_target(name) for name in self.targets or target_names()]
        for name in self.passes:
            if name not in PASSES:
                raise ErrSegError(f"no pass {name!r}: choose out of {', '.join(PASSES)}")
        for target in targets:
            for name in self.providers:
                find_provider(name, target, self.device.type, self.official is not None)
        return targets

    def cases(self, target: Target) -> list[Case]:
        """The sizes of a target."""
        if self.quick:
            return [target.quick]
        return list({case.label: case for case in (*(target.sweeps if self.sweep else ()), *target.cases)}.values())

    def passes_of(self, target: Target) -> list[str]:
        """The passes of a target that are asked for and that it has."""
        if "step" in target.passes or not self.passes:
            return list(target.passes)
        return [name for name in PASSES if name in self.passes and (target.differentiable or name == "forward")]

    def providers_of(self, target: Target, case: Case) -> list[str]:
        """The providers asked for, or all that run here; compiling is for the main sizes, not for whole curves."""
        if self.providers:
            return list(self.providers)
        compiled = not self.quick and case in target.cases
        return default_names(target, self.device.type, compiled, self.official is not None)


def run(request: Request, say: Callable[[str], None], done: Callable[[list[Row]], None]) -> list[Row]:
    """Measure everything; `done` gets the rows of each group, which are on disk by then."""
    targets = request.chosen()
    clock = make_clock(request.device)
    card = machine_card(request.device)
    rows: list[Row] = []
    runners = []
    for precision in request.precisions:
        say(f"measuring the machine in {precision.name}")
        ceilings = measure_ceilings(request.device, precision, clock, request.quick)
        effort = QUICK if request.quick else request.effort
        runner = Runner(request.device, precision, effort, clock, ceilings, card["run"], request.official)
        runners.append(runner)
    append_card(request.folder, card | {"request": _described(request), "ceilings": _ceilings(runners)})
    for target in targets:
        for case in request.cases(target):
            for runner in runners:
                where = f"{target.name} [{case.label}] {runner.precision.name}"
                runner.say = lambda text, where=where: say(f"{where}: {text}")  # type: ignore[misc]
                passes = request.passes_of(target)
                found = runner.measure(target, case, request.providers_of(target, case), passes) if passes else []
                append_rows(request.folder, found)
                rows += found
                done(found)
    return rows


def _described(request: Request) -> dict[str, Any]:
    return {
        "targets": list(request.targets),
        "providers": list(request.providers),
        "passes": list(request.passes),
        "precisions": [p.name for p in request.precisions],
        "tf32": any(p.tf32 for p in request.precisions),
        "quick": request.quick,
        "sweep": request.sweep,
    }


def _ceilings(runners: Sequence[Runner]) -> dict[str, Any]:
    return {runner.precision.name: runner.ceilings for runner in runners}


def complaints(request: Request, rows: Sequence[Row]) -> list[str]:
    """Why the invocation as a whole failed; empty when it did not."""
    found = []
    failed = sum(row.status == FAILED for row in rows)
    if failed:
        found.append(f"{failed} of {len(rows)} rows failed")
    measured = {row.provider for row in rows if row.status == OK}
    if not measured:
        found.append("nothing was measured")
    idle = [name for name in request.providers if name not in measured]
    if measured and idle:
        found.append(f"nothing was measured for {', '.join(idle)}")
    return found
