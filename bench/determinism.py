"""`python -m errseg.bench.determinism`: whether repeated calls give the same bits, forward and backward."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from errseg.bench.exercise import MANY_BLOCKS, Exercise, exercises
from errseg.bench.providers import BACKENDS_ON
from errseg.bench.sanitize import say, why_nothing


def differing_runs(exercise: Exercise, runs: int) -> int:
    """How many of the later runs differ from the first in any bit."""
    first = [_bits(t) for t in exercise.run()]
    differing = 0
    for _ in range(runs - 1):
        again = [_bits(t) for t in exercise.run()]
        differing += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return differing


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when at least one op ran and all were deterministic, else 1."""
    parser = argparse.ArgumentParser(prog="python -m errseg.bench.determinism", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    ran, wrong = 0, 0
    for backend in BACKENDS_ON[device.type]:
        for exercise in exercises(backend, device, MANY_BLOCKS):
            differing = differing_runs(exercise, options.runs)
            say(f"{exercise.name}: {f'{differing} of {options.runs} runs differ' if differing else 'same bits'}")
            ran, wrong = ran + 1, wrong + bool(differing)
        if not ran:
            say(why_nothing(backend))
    say(f"{ran} calls, {wrong} not deterministic")
    return 0 if ran and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
