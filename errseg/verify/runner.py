"""Runs the grid: every case in every dtype on every backend, beside eager PyTorch and against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from errseg import ops
from errseg.errors import ErrSegError
from errseg.ops.contract import INTERPRETED
from errseg.testing.memory import poisoned_memory
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample
from errseg.verify import checks
from errseg.verify.cases import Case, argument_names, cases
from errseg.verify.checks import Check, Leniency
from errseg.verify.rows import NOT_RUN, Row, dtype_name

INTERPRETED_HALF = ("published channels", "one pixel")  # an interpreter takes seconds a case
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
    progress: Progress | None = None,
) -> list[Row]:
    """Verify every op on every backend that can run here.

    Args:
        quick: small shapes only; otherwise the real sizes of both published models too.
        ops: names of ops, all by default; with a choice the golden numbers are left out.
        backends: names of backends, all by default; one that is asked for and cannot run fails.
        device: where the tensors are, "cpu" or "cuda".
        golden: compare with the golden numbers as well.
        official: a checkout of the published code; then the rows compare with that code and nothing else runs.
        progress: called before each case.

    Returns:
        one row per case; :func:`errseg.verify.succeeded` is the verdict on all of them.

    Raises:
        ErrSegError: for an unknown op or backend, a device that is not there, a folder that is no checkout.
    """
    where = _device(device)
    progress = progress or (lambda done, total, text: None)
    with exact_arithmetic():
        if official is not None:
            from errseg.verify.official import run_official

            return run_official(Path(official), quick=quick, device=where, progress=progress)
        tasks = _op_tasks(_chosen_ops(ops), _chosen_backends(backends), where, quick)
        if golden and ops is None:
            from errseg.verify.golden import golden_tasks

            tasks += golden_tasks(_chosen_backends(backends), where, quick)
        rows: list[Row] = []
        for done, (text, task) in enumerate(tasks):
            progress(done, len(tasks), text)
            rows += task()
        progress(len(tasks), len(tasks), "")
    return rows + _never_executed(rows, asked=backends is not None)


Task = tuple[str, Callable[[], list[Row]]]


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


@dataclasses.dataclass
class Outcome:
    """Results of a call, by name, and the gradients of one random functional of the first of them."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def run_case(case: Case, backends: Sequence[str], device: torch.device) -> list[Row]:
    """The rows of one case: every dtype on every backend."""
    rows = []
    names = [name for name in backends if name in ops.OPS[case.op].backends]
    for dtype in REFERENCE_DTYPES if case.op != "select_classes" else (torch.int64,):
        wanted = [name for name in names if dtype != torch.float64 or name == "reference"]
        if not wanted:
            continue
        yardstick = _Yardstick(case, dtype, device)
        for backend in wanted:
            started = time.perf_counter()
            row = _run_backend(case, backend, dtype, device, yardstick)
            rows.append(dataclasses.replace(row, seconds=time.perf_counter() - started))
    return rows


class _Yardstick:
    """What a case is compared with, in one dtype: float64 and eager runs, made when first needed."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self._calls: dict[int, Sample] = {}
        self._outcomes: dict[tuple[str, int], Outcome] = {}

    @property
    def draws(self) -> range:
        """The draws that every backend runs."""
        return range(self.case.draws)

    def more_draws(self, count: int) -> range:
        """Further draws of small cases, for another look at eager's errors."""
        return range(self.case.draws, self.case.draws + (0 if self.case.real else count))

    def call(self, draw: int) -> Sample:
        """The call in the dtype and on the device."""
        if draw not in self._calls:
            call = self.case.call(draw)
            call = call.to(self.dtype) if self.dtype.is_floating_point else call
            self._calls[draw] = call.map(lambda t: t.to(self.device))
        return self._calls[draw]

    def truth(self, draw: int, gates: Gates | None = None) -> Outcome:
        """The reference in float64 on the same rounded inputs, some of its gates on the other side of their kink."""

        def exact(call: Sample) -> Any:
            with flipped(gates):
                return call(backend="reference")

        return self._make(f"truth {gates}", draw, lambda: evaluate(self.case, self.call(draw).to(torch.float64), exact))

    def published_in_float64(self) -> Outcome:
        """The published order in float64: what the labels of the reference are compared with."""
        how = published if self.case.sizes.batch else _on("reference")
        return self._make("exact", 0, lambda: evaluate(self.case, self.call(0).to(torch.float64), how))

    def eager(self, backend: str, draw: int) -> Outcome:
        """The published order of operations beside the reference, the reference beside other backends."""
        how = published if backend == "reference" and self.case.sizes.batch else _on("reference")
        return self._make(how.__name__, draw, lambda: evaluate(self.case, self.call(draw), how))

    def kinks(self, draw: int) -> dict[str, Tensor]:
        """Per gradient, how far gates can move it whose input is within rounding of a kink; empty without gates."""
        if self.case.op not in GATED or self.dtype == torch.float64:
            return {}
        within = (32 if self.dtype == torch.float32 else 16) * torch.finfo(self.dtype).eps / 2
        straight = {name: grad for name, grad in self.truth(draw).gradients.items() if grad is not None}
        moved = {name: torch.zeros_like(grad) for name, grad in straight.items()}
        for part in range(GATE_PARTS):
            for name, grad in self.truth(draw, Gates(within, part)).gradients.items():
                if grad is not None:
                    moved[name] += (grad - straight[name]).abs()
        return moved

    def _make(self, key: str, draw: int, how: Callable[[], Outcome]) -> Outcome:
        if (key, draw) not in self._outcomes:
            self._outcomes[key, draw] = how()
        return self._outcomes[key, draw]


GATED = ("gated_mlp", "class_attention")
GATE_PARTS = 12
# When an error is too large: further draws for eager, then for the backend too, then a look at the gates' kinks.
LUCK = 30.0  # times the limit: beyond it no further look is worth the time
LOOKS = ((3, False, False), (9, True, False), (9, True, True))


@dataclasses.dataclass(frozen=True)
class Look:
    """The draws that eager runs beyond those of every backend, and what the backend answered on them."""

    draws: range = range(0)
    outcomes: dict[int, Outcome] = dataclasses.field(default_factory=dict)
    gates: bool = False


class Gates(NamedTuple):
    """The ReLU6 whose inputs are `within` of a kink, one part of them."""

    within: float
    part: int


class _FlippedReLU6(torch.autograd.Function):
    """ReLU6 that lets gradients pass where it would not, and the reverse, at the gates named."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Gates) -> Tensor:
        near = (x.abs() < gates.within) | ((x - 6).abs() < gates.within)
        mine = torch.arange(x.numel(), device=x.device).reshape(x.shape) % GATE_PARTS == gates.part
        ctx.save_for_backward(((x > 0) & (x < 6)) ^ (near & mine))
        return x.clamp(0, 6)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


@contextlib.contextmanager
def flipped(gates: Gates | None) -> Iterator[None]:
    """Which side of a kink rounding chooses is luck: what the gradients are when some gates choose the other."""
    if gates is None:
        yield
        return
    with patch.object(torch.nn.functional, "relu6", lambda x: _FlippedReLU6.apply(x, gates)):
        yield


def _on(backend: str) -> Callable[[Sample], Any]:
    def reference(call: Sample) -> Any:
        return call(backend=backend)

    return reference


def _run_backend(case: Case, backend: str, dtype: torch.dtype, device: torch.device, yardstick: _Yardstick) -> Row:
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
            others = _evaluate_poisoned(backend, yardstick, draws[:2] if interpreted else draws) if again else {}
            found = compare(backend, list(outcomes.values()), yardstick, Look(draws, others, gates))
    return dataclasses.replace(row, checks=tuple(found))


def _may_be_luck(found: list[Check], yardstick: _Yardstick) -> bool:
    """Whether some error is too large, and every such error is a number that luck could explain."""
    failures = [check for check in found if not check.passed]
    # One flipped gate in a small case moves a float32 gradient by up to a tenth.
    gates = yardstick.case.op in GATED and yardstick.dtype == torch.float32
    limit = 1e6 if gates else LUCK
    return bool(failures) and all(check.measure in checks.MEASURES and check.severity < limit for check in failures)


def _evaluate_poisoned(backend: str, yardstick: _Yardstick, draws: range) -> dict[int, Outcome]:
    with poisoned_memory():
        return {draw: evaluate(yardstick.case, yardstick.call(draw), _on(backend)) for draw in draws}


def _why_not(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a row is not run at all, found out before anything large is made."""
    op = ops.OPS[case.op]
    reason = op.why_not(backend)
    if reason == INTERPRETED and case.real:
        return "interpreted: real sizes are for a GPU"
    if reason == INTERPRETED and dtype in (torch.bfloat16, torch.float16) and case.name not in INTERPRETED_HALF:
        return f"interpreted: half precision only for {' and '.join(INTERPRETED_HALF)}"
    if reason not in (None, INTERPRETED):
        return reason
    needed = case.gigabytes + (case.published_gigabytes if backend == "reference" else 0)
    free = free_gigabytes(device)
    return f"needs {needed:.1f} GB, {free:.1f} GB are free" if needed > 0.8 * free else None


def free_gigabytes(device: torch.device) -> float:
    """Memory that a run may use now; without a way to know, 4 GB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024 / 1e9
    return 4.0


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def evaluate(case: Case, call: Sample, how: Callable[[Sample], Any]) -> Outcome:
    """Results and gradients of a call, its tensors laid out as the case says."""
    differentiable = bool(ops.OPS[case.op].differentiable)
    names = leaf_names(call)
    leaves = [leaf.detach().clone() for leaf in call.leaves()]
    wanted = {name: leaf for name, leaf in zip(names, leaves, strict=True) if not name.startswith("drop_path")}
    if differentiable:
        for leaf in wanted.values():
            leaf.requires_grad_()
    results = how(case.arrange(call.with_leaves(iter(leaves))))
    results = (
        dict(zip(("labels", "scores"), results, strict=True)) if isinstance(results, tuple) else {"result": results}
    )
    if not differentiable:
        return Outcome(results, {})
    first = results["result"]
    cotangent = torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    if first.ndim == 0:
        cotangent = torch.tensor(_loss_scale(call))
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if first.requires_grad:
        cotangent = cotangent.to(first)
        gradients = torch.autograd.grad(first, list(wanted.values()), cotangent, allow_unused=True)
    return Outcome({"result": first.detach()}, dict(zip(wanted, gradients, strict=True)))


def _loss_scale(call: Sample) -> float:
    """A power of two that undoes the mean of a loss, as a gradient scaler would: float16 has no smaller numbers."""
    target = call.args[2]
    return 2.0 ** round(math.log2(max(1, target.numel()) * call.kwargs["vocabulary_size"]))


def leaf_names(call: Sample) -> list[str]:
    """Names of a call's floating tensors, in the order of `Sample.leaves`."""
    named = dict(zip(argument_names(call), call.args, strict=True)) | call.kwargs
    return [name for argument, value in named.items() for name in _names_in(argument, value)]


def _names_in(name: str, value: Any) -> list[str]:
    if isinstance(value, Tensor):
        return [name] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", range(len(value)))
        return [n for field, item in zip(fields, value, strict=True) for n in _names_in(f"{name}.{field}", item)]
    if dataclasses.is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return [n for field, item in parts for n in _names_in(field if name == "params" else f"{name}.{field}", item)]
    return []


# ---- comparison


def compare(backend: str, got: list[Outcome], yardstick: _Yardstick, look: Look | None = None) -> list[Check]:
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
    yardstick: _Yardstick, backend: str, kind: str, name: str, look: Look | None, kinks: Tensor | None = None
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


def _compare_result(
    name: str, backend: str, got: list[Tensor], yardstick: _Yardstick, look: Look | None
) -> list[Check]:
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
    name: str, backend: str, draw: int, got: Tensor | None, yardstick: _Yardstick, leniency: Leniency
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


def _never_executed(rows: list[Row], asked: bool) -> list[Row]:
    """A failing row for each op and backend that can run here and of which no case was executed."""
    executed = {(row.op, row.backend) for row in rows if row.status != NOT_RUN}
    pairs = dict.fromkeys((row.op, row.backend) for row in rows)
    missing = []
    for name, backend in pairs:
        if (name, backend) in executed:
            continue
        available = ops.OPS[name].why_not(backend) if name in ops.OPS else None
        if asked or available in (None, INTERPRETED):
            reason = "nothing was executed: " + next(r.reason for r in rows if (r.op, r.backend) == (name, backend))
            missing.append(Row(name, backend, "", "all cases", reason=reason, crashed=True))
    return missing
