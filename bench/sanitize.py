"""`python -m errseg.bench.sanitize`: every CUDA op once at small odd sizes, for compute-sanitizer to watch."""

from __future__ import annotations

import argparse
import sys

import torch

from errseg import ops
from errseg.bench.exercise import ODD, exercises


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when at least one op ran and every result is a number, else 1."""
    parser = argparse.ArgumentParser(prog="python -m errseg.bench.sanitize", description=__doc__)
    parser.add_argument("--backend", default="cuda", help="the backend to run (default: cuda)")
    parser.add_argument("--device", default=None, help="where its tensors are; by default where the backend runs")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if options.backend in ("cuda", "triton") else "cpu"))
    ran, wrong = 0, 0
    for exercise in exercises(options.backend, device, ODD):
        results = exercise.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        bad = [t for t in results if t.is_floating_point() and not bool(t.isfinite().all())]
        say(f"{exercise.name}: {'not finite' if bad else 'ran'}")
        ran, wrong = ran + 1, wrong + bool(bad)
    if not ran:
        say(why_nothing(options.backend))
    say(f"{ran} calls, {wrong} with results that are not finite")
    return 0 if ran and not wrong else 1


def why_nothing(backend: str) -> str:
    """Why no op has run."""
    reasons = {op.why_not(backend) for op in ops.OPS.values()} - {None}
    return f"nothing to run on {backend}: {'; '.join(sorted(map(str, reasons))) or 'no dtype fits'}"


def say(text: str) -> None:
    """A line of output at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
