"""Runs the grid: every case in every dtype on every backend, beside eager PyTorch and against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from errseg import ops
from errseg.errors import ErrSegError
from errseg.ops.contract import INTERPRETED
from errseg.testing.memory import poisoned_memory
from errseg.verify import checks
from errseg.verify.cases import WITH_CHANNELS, Case, cases
from errseg.verify.checks import Check
from errseg.verify.comparison import Look, compare
from errseg.verify.room import elsewhere, free_gigabytes
from errseg.verify.rows import NOT_RUN, Row, Task, dtype_name
from errseg.verify.yardstick import GATED, Outcome, Outcomes, Yardstick, evaluate, on_backend

INTERPRETED_HALF = ("published channels", "one pixel")  # an interpreter takes seconds a case
INTERPRETED_WIDE = ("published channels", "one pixel", "one class", "drop path")  # of the ops on tokens
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_DTYPES = (torch.float64, *DTYPES)

Progress = Callable[[int, int, str], object]
"""Called with the cases done, the cases in all, and what comes next."""


def run(
    *,
    quick: bool = False,
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    golden: bool = True,
    official: str | Path | None = None,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
    on_row: Callable[[Row], object] | None = None,
) -> list[Row]:
    """Verify every op on every backend that can run here.

    Args:
        quick: small shapes only; otherwise the real sizes of both published models too.
        ops: names of ops, all by default; with a choice the golden numbers are left out.
        backends: names of backends, all by default; one that is asked for and cannot run fails.
        device: where the tensors are, "cpu" or "cuda".
        golden: compare with the golden numbers as well.
        official: a checkout of the published code; then the rows compare with that code and nothing else runs.
        only: run only cases with one of these texts in their name, as progress tells it ("gated_mlp: L, 48x48, K 48").
        progress: called before each case.
        on_row: called with each row as soon as it is there.

    Returns:
        one row per case; :func:`errseg.verify.succeeded` is the verdict on all of them.

    Raises:
        ErrSegError: for an unknown op or backend, a device that is not there, a folder that is no checkout, a text
            that no case has in its name.
    """
    where = _device(device)
    progress = progress or (lambda done, total, text: None)
    on_row = on_row or (lambda row: None)
    with exact_arithmetic():
        tasks = _chosen_tasks(ops, backends, where, quick, golden, official, only)
        rows: list[Row] = []
        for done, (text, task) in enumerate(tasks):
            progress(done, len(tasks), text)
            for row in task():
                rows.append(row)
                on_row(row)
        progress(len(tasks), len(tasks), "")
    # A few chosen cases need not reach every backend.
    missing = [] if only and not backends else _never_executed(rows, where, asked=backends is not None)
    for row in missing:
        on_row(row)
    return rows + missing


def _chosen_tasks(
    names: Sequence[str] | None,
    backends: Sequence[str] | None,
    device: torch.device,
    quick: bool,
    golden: bool,
    official: str | Path | None,
    only: Sequence[str] | None,
) -> list[Task]:
    if official is not None:
        from errseg.verify.official import official_tasks

        tasks = official_tasks(Path(official), device, quick)
    else:
        tasks = _op_tasks(_chosen_ops(names), _chosen_backends(backends), device, quick)
        if golden and names is None:
            from errseg.verify.golden import golden_tasks

            tasks += golden_tasks(_chosen_backends(backends), device, quick)
    if only is None:
        return tasks
    chosen = [(text, task) for text, task in tasks if any(part in text for part in only)]
    if not chosen:
        raise ErrSegError(f"no case has {' or '.join(map(repr, only))} in its name: one is {tasks[-1][0]!r}")
    return chosen


def _op_tasks(names: list[str], backends: list[str], device: torch.device, quick: bool) -> list[Task]:
    return [
        (f"{name}: {case.name}", lambda case=case: run_case(case, backends, device))  # type: ignore[misc]
        for name in names
        for case in cases(name, quick=quick)
    ]


def _chosen_ops(names: Sequence[str] | None) -> list[str]:
    unknown = [name for name in names or () if name not in ops.OPS]
    if unknown:
        raise ErrSegError(f"no op {unknown[0]!r}: choose out of {', '.join(ops.OPS)}")
    return list(ops.OPS if names is None else names)


def _chosen_backends(names: Sequence[str] | None) -> list[str]:
    unknown = [name for name in names or () if name not in ops.BACKENDS]
    if unknown:
        raise ErrSegError(f"no backend {unknown[0]!r}: choose out of {', '.join(ops.BACKENDS)}")
    return list(ops.BACKENDS if names is None else names)


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ErrSegError(f"no device {device!r}: choose cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ErrSegError("no NVIDIA GPU is at hand: leave out --device, or use --device cpu")
    return chosen


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Float32 means float32: no TF32, whatever the process has set; the random state is left as it was."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    with torch.random.fork_rng():
        try:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


# ---- one case


def run_case(case: Case, backends: Sequence[str], device: torch.device) -> list[Row]:
    """The rows of one case: every dtype on every backend."""
    rows, exact = [], Outcomes()
    names = [name for name in backends if name in ops.OPS[case.op].backends]
    for dtype in REFERENCE_DTYPES if case.op != "select_classes" else (torch.int64,):
        wanted = [name for name in names if dtype != torch.float64 or name == "reference"]
        if not wanted:
            continue
        yardstick = Yardstick(case, dtype, device, exact)
        for backend in wanted:
            started = time.perf_counter()
            row = _run_backend(case, backend, dtype, device, yardstick)
            rows.append(dataclasses.replace(row, seconds=time.perf_counter() - started))
    return rows


# When an error is too large: further draws for eager, then for the backend too, then a look at the gates' kinks.
LUCK = 30.0  # times the limit: beyond it no further look is worth the time
LOOKS = ((3, False, False), (9, True, False), (9, True, True))


def _run_backend(case: Case, backend: str, dtype: torch.dtype, device: torch.device, yardstick: Yardstick) -> Row:
    op = ops.OPS[case.op]
    interpreted = op.why_not(backend) == INTERPRETED
    row = Row(case.op, backend, dtype_name(dtype), case.name, interpreted=interpreted, device=device.type)
    reason = _why_not(case, backend, dtype, device)
    if reason is None:
        arguments = case.arrange(yardstick.call(0)).raw_arguments()
        reason = op.why_not(backend, *arguments)
    if reason not in (None, INTERPRETED):
        return dataclasses.replace(row, reason=str(reason))
    try:
        outcomes = _evaluate_poisoned(backend, yardstick, yardstick.draws[:1] if interpreted else yardstick.draws)
    except Exception as error:  # whatever a broken kernel raises is the verdict on it
        return dataclasses.replace(row, reason=_one_line(error), crashed=True)
    try:
        yardstick.eager(backend, 0)
    except (NotImplementedError, RuntimeError) as error:  # PyTorch has not every operator in every dtype
        return dataclasses.replace(row, reason=f"eager PyTorch is no yardstick here: {_one_line(error)}")
    found = compare(backend, list(outcomes.values()), yardstick)
    for more, again, gates in LOOKS:
        if _may_be_luck(found, yardstick):
            draws = yardstick.more_draws(more)
            try:
                others = _evaluate_poisoned(backend, yardstick, draws[:2] if interpreted else draws) if again else {}
            except Exception as error:  # as above
                return dataclasses.replace(row, reason=_one_line(error), crashed=True)
            found = compare(backend, list(outcomes.values()), yardstick, Look(draws, others, gates))
    return dataclasses.replace(row, checks=tuple(found))


def _may_be_luck(found: list[Check], yardstick: Yardstick) -> bool:
    """Whether some error is too large, and every such error is a number that luck could explain."""
    failures = [check for check in found if not check.passed]
    # One flipped gate in a small case moves a gradient by up to a tenth; only bfloat16's own errors are as large.
    gates = yardstick.case.op in GATED and yardstick.dtype in (torch.float32, torch.float16)
    limit = 1e6 if gates else LUCK
    return bool(failures) and all(check.measure in checks.MEASURES and check.severity < limit for check in failures)


def _evaluate_poisoned(backend: str, yardstick: Yardstick, draws: range) -> dict[int, Outcome]:
    case = yardstick.case
    if case.real and backend == "reference" and yardstick.dtype == torch.float64:
        return {draw: yardstick.truth(draw) for draw in draws}  # itself the yardstick; what counts is eager beside it
    with poisoned_memory():
        return {draw: evaluate(case, yardstick.call(draw), on_backend(backend)) for draw in draws}


def _why_not(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a row is not run at all, found out before anything large is made."""
    op = ops.OPS[case.op]
    reason = op.why_not(backend) or elsewhere(backend, device)
    if reason == INTERPRETED and case.real:
        return "interpreted: real sizes are for a GPU"
    half = dtype in (torch.bfloat16, torch.float16)
    if reason == INTERPRETED and half and not case.narrow and case.name not in INTERPRETED_HALF:
        return f"interpreted: half precision only for narrow cases, {' and '.join(INTERPRETED_HALF)}"
    if reason not in (None, INTERPRETED):
        return reason
    wide = case.op in WITH_CHANNELS and case.sizes.channels >= 128
    if reason == INTERPRETED and wide and case.name not in INTERPRETED_WIDE:
        return f"interpreted: 128 channels only for {', '.join(INTERPRETED_WIDE)}"
    if case.slow_half and dtype == torch.float16 and device.type == "cpu":
        return "PyTorch multiplies float16 too slowly on a CPU for this size"
    free, published = free_gigabytes(device), 0.0
    if backend == "reference":
        published = case.published_gigabytes * max(4, dtype.itemsize) / 8  # PyTorch's half precision makes float32 too
    needed = case.gigabytes + published
    return f"needs {needed:.1f} GB, {free:.1f} GB are free" if needed > 0.8 * free else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _never_executed(rows: list[Row], device: torch.device, asked: bool) -> list[Row]:
    """A failing row for each op and backend that can run here and of which no case was executed."""
    executed = {(row.op, row.backend) for row in rows if row.status != NOT_RUN}
    pairs = dict.fromkeys((row.op, row.backend) for row in rows)
    missing = []
    for name, backend in pairs:
        if (name, backend) in executed:
            continue
        available = (ops.OPS[name].why_not(backend) or elsewhere(backend, device)) if name in ops.OPS else None
        if asked or available in (None, INTERPRETED):
            reason = "nothing was executed: " + next(r.reason for r in rows if (r.op, r.backend) == (name, backend))
            missing.append(Row(name, backend, "", "all cases", reason=reason, crashed=True))
    return missing
