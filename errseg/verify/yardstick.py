"""What a case is measured against: runs in float64 and in eager PyTorch, with their gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg import ops
from errseg.model import channels_last
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample
from errseg.verify.cases import Case, argument_names

GATED = ("gated_mlp", "class_attention", "up_step")
GATE_PARTS = 12


@dataclasses.dataclass
class Outcome:
    """Results of a call, by name, and the gradients of one random functional of the first of them."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


Outcomes = dict[tuple[str, int], Outcome]


class Yardstick:
    """What a case is compared with, in one dtype: float64 and eager runs, made when first needed.

    `exact` holds the float64 runs, which every dtype that keeps the inputs as they are shares.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, exact: Outcomes | None = None) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self._exact = {} if exact is None else exact
        self._unrounded: dict[int, bool] = {}
        self._calls: dict[int, Sample] = {}
        self._outcomes: Outcomes = {}

    @property
    def draws(self) -> range:
        """The draws that every backend runs."""
        return range(self.case.draws)

    def more_draws(self, count: int) -> range:
        """Further draws for another look at eager's errors, few of them at real sizes."""
        return range(self.case.draws, self.case.draws + (min(count, 2) if self.case.real else count))

    def call(self, draw: int) -> Sample:
        """The call in the dtype and on the device."""
        if draw not in self._calls:
            exact = self.case.call(draw)
            call = exact.to(self.dtype) if self.dtype.is_floating_point else exact
            pairs = zip(call.leaves(), exact.leaves(), strict=True)
            self._unrounded[draw] = all(rounded.to(t.dtype).equal(t) for rounded, t in pairs)
            self._calls[draw] = call.map(lambda t: t.to(self.device))
        return self._calls[draw]

    def truth(self, draw: int, gates: Gates | None = None) -> Outcome:
        """The reference in float64 on the same rounded inputs, some of its gates on the other side of their kink."""

        def exact(call: Sample) -> Any:
            with flipped(gates):
                return call(backend="reference")

        call = self.call(draw).to(torch.float64)
        shared = self._exact if self._unrounded[draw] else self._outcomes
        return self._make(f"truth {gates}", draw, lambda: evaluate(self.case, call, exact), shared)

    def published_in_float64(self) -> Outcome:
        """The published order in float64: what the labels of the reference are compared with."""
        how = published if self.case.sizes.batch else on_backend("reference")
        call = self.call(0).to(torch.float64)
        shared = self._exact if self._unrounded[0] else self._outcomes
        return self._make("published", 0, lambda: evaluate(self.case, call, how), shared)

    def eager(self, backend: str, draw: int) -> Outcome:
        """The published order of operations beside the reference, the reference beside other backends."""
        how = published if backend == "reference" and self.case.sizes.batch else on_backend("reference")
        return self._make(how.__name__, draw, lambda: evaluate(self.case, self.call(draw), how), self._outcomes)

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

    def _make(self, key: str, draw: int, how: Callable[[], Outcome], kept: Outcomes) -> Outcome:
        if (key, draw) not in kept:
            kept[key, draw] = how()
        return kept[key, draw]


class Gates(NamedTuple):
    """The ReLU and ReLU6 whose inputs are `within` of a kink, one part out of `parts`."""

    within: float
    part: int
    parts: int = GATE_PARTS


class _FlippedGate(torch.autograd.Function):
    """A clamp to 0..top that lets gradients pass where it would not, and the reverse, at the gates named."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float, gates: Gates) -> Tensor:
        near = (x.abs() < gates.within) | ((x - top).abs() < gates.within)
        mine = torch.arange(x.numel(), device=x.device).reshape(x.shape) % gates.parts == gates.part
        ctx.save_for_backward(((x > 0) & (x < top)) ^ (near & mine))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


@contextlib.contextmanager
def flipped(gates: Gates | None) -> Iterator[None]:
    """Which side of a kink rounding chooses is luck: what the gradients are when some gates choose the other."""
    if gates is None:
        yield
        return
    with (
        patch.object(F, "relu6", lambda x: _FlippedGate.apply(x, 6.0, gates)),
        patch.object(F, "relu", lambda x: _FlippedGate.apply(x, math.inf, gates)),
        patch.object(channels_last, "fusable", lambda *args: False),  # its gates are its own
    ):
        yield


def on_backend(backend: str) -> Callable[[Sample], Any]:
    """How `evaluate` runs a call: on this backend."""

    def reference(call: Sample) -> Any:
        return call(backend=backend)

    return reference


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
