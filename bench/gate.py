"""The gate in front of the stopwatch: what is wrong is not timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from errseg import ops
from errseg.bench.precision import Precision
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.testing.compare import error_budget
from errseg.testing.memory import poisoned_memory
from errseg.testing.samples import map_tensors
from errseg.verify.checks import Check

T = TypeVar("T")

EAGER_FACTOR = 2.0
# Nothing may err more than this, eager code included (root mean square over root mean square).
SANITY = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_SANITY = 1e-2
# Times that for gradients. Where float32 rounds an activation to the other side of a ReLU6's end, a whole entry of a
# gradient comes or goes: rare, but large beside float32's rounding.
GRADIENT_SANITY = {torch.float64: 3.0, torch.float32: 30.0, torch.float16: 3.0, torch.bfloat16: 3.0}
VANISHING = 1e-7  # a gradient this much smaller than the largest one is zero but for rounding


@dataclass(frozen=True)
class Outcome:
    """A result in the target's layout and, where asked for, gradients by name."""

    result: Any
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Probe:
    """One implementation with a choice of backends and a precision, ready to be called on canonical inputs."""

    def __init__(
        self,
        target: Target,
        name: str,
        implementation: Implementation,
        backends: tuple[str, ...],
        device: torch.device,
        precision: Precision | None,
        compiled: bool = False,
    ) -> None:
        self.target = target
        self.name = name  # of the implementation
        self.implementation = implementation
        self.backends = backends
        self.device = device
        self.precision = precision  # None: float64
        self.compiled = compiled
        self.dtype = precision.tensors if precision else torch.float64
        module = implementation.module
        self.module = None if module is None else module.to(device, self.dtype)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Backends and precision as they are wanted."""
        casting = self.precision.active(self.device.type) if self.precision else contextlib.nullcontext()
        with ops.use_backend(*self.backends), casting:
            yield

    def arguments(self, inputs: Inputs) -> Inputs:
        """What `run` takes for these canonical inputs."""
        prepared = self.implementation.prepare(inputs)
        return prepared if self.module is None else (self.module, *prepared)

    def convert(self, inputs: Inputs, requires_grad: bool = False) -> Inputs:
        """Canonical inputs on the device in the dtype, floating tensors as leaves."""

        def change(tensor: Tensor) -> Tensor:
            floating = tensor.is_floating_point()
            moved = tensor.detach().to(self.device, self.dtype if floating else None)
            return moved.requires_grad_(requires_grad and floating)

        converted: Inputs = map_tensors(inputs, change)
        return converted

    def outcome(self, inputs: Inputs, gradients: bool) -> Outcome:
        """The canonical result and the gradients of a fixed random functional of it."""
        inputs = self.convert(inputs, gradients)
        with self.scope(), torch.set_grad_enabled(gradients):
            result = self.implementation.canonical(self.implementation.run(*self.arguments(inputs)))
        if not gradients:
            return Outcome(result)
        leaves = {f"gradient of argument {i}": leaf for i, leaf in enumerate(floating_tensors(inputs))}
        if self.module is not None:
            leaves |= {f"gradient of {k}": v for k, v in self.implementation.weights(self.module).items()}
        value = self.target.differentiate(result)
        found = torch.autograd.grad(value, list(leaves.values()), random_cotangent(value), allow_unused=True)
        return Outcome(result, {k: g for k, g in zip(leaves, found, strict=True) if g is not None})


def floating_tensors(value: Any) -> list[Tensor]:
    """Floating tensors in nested arguments, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found


def random_cotangent(value: Tensor) -> Tensor:
    """A fixed random gradient of a result; one for a scalar."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return noise.bfloat16().to(value.device, value.dtype) if value.ndim else torch.ones_like(value)


@dataclass(frozen=True)
class Trial:
    """A candidate, eager code of the same precision, and the float64 reference, on the same rounded inputs."""

    target: Target
    candidate: Probe
    eager: Probe
    truth: Probe
    inputs: Inputs
    gradients: bool
    cache: dict[Any, tuple[Any, Any]]  # what yardsticks gave, shared by all candidates

    def of(self, probe: Probe, inputs: Inputs | None = None) -> Outcome:
        """The outcome of a yardstick, computed once, or of the candidate."""
        inputs = self.inputs if inputs is None else inputs
        rounded = self.eager.convert(inputs)  # the truth sees the same rounded numbers
        if probe is self.candidate:
            with contextlib.nullcontext() if probe.compiled else poisoned_memory():
                return probe.outcome(rounded, self.gradients)
        key = (id(probe), *(t.data_ptr() if isinstance(t, Tensor) else t for t in _flat(inputs)))
        if key not in self.cache:  # the inputs are kept, so that no other tensor gets their address
            self.cache[key] = probe.outcome(rounded, self.gradients), inputs
        outcome: Outcome = self.cache[key][0]
        return outcome

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Something that all candidates are held against, computed once."""
        if name not in self.cache:
            self.cache[name] = compute(), None
        value: T = self.cache[name][0]
        return value

    def compare(self, candidate: Outcome, eager: Outcome, truth: Outcome, of: Callable[[Any], Tensor]) -> None:
        """The result and the gradients, pooled, within the eager budget."""
        self.within_budget("result", of(candidate.result), of(eager.result), of(truth.result), 1.0)
        if not self.gradients:
            return
        missing = truth.gradients.keys() - candidate.gradients.keys()
        if missing:
            raise AssertionError(f"no gradient for {', '.join(sorted(missing))}")
        for name, wanted in truth.gradients.items():
            if candidate.gradients[name].shape != wanted.shape:
                got = list(candidate.gradients[name].shape)
                raise AssertionError(f"{name}: expected {list(wanted.shape)}, got {got}")
        own, beside, exact = (_pool(outcome.gradients, truth.gradients) for outcome in (candidate, eager, truth))
        sanity = GRADIENT_SANITY[self.candidate.dtype]
        self.within_budget("gradients", own, beside, exact, sanity, exempt=self.target.kinked)

    def within_budget(
        self, name: str, candidate: Tensor, eager: Tensor, truth: Tensor, sanity: float, exempt: bool = False
    ) -> None:
        """At most `EAGER_FACTOR` times the error of eager code, unless exempt; nothing beyond sanity."""
        if candidate.dtype == torch.float64 or not candidate.is_floating_point():
            raise AssertionError(f"{name}: expected a result in {self.candidate.dtype}, got {candidate.dtype}")
        budget = error_budget(candidate, eager.to(candidate.dtype), truth)
        exempt |= budget.candidate <= self.target.floor
        if budget.exceeded(EAGER_FACTOR) and not exempt and self.candidate is not self.eager:
            raise AssertionError(f"{name}: over {EAGER_FACTOR:g} x eager: {budget}")
        limit = sanity * self._sanity(candidate.dtype)
        if not budget.candidate_rms <= limit:
            raise AssertionError(f"{name}: error {budget.candidate_rms:.3g} (rms), more than {limit:g} is no rounding")

    def _sanity(self, dtype: torch.dtype) -> float:
        precision = self.candidate.precision
        if precision is not None and dtype == torch.float32:
            if precision.autocast:
                return SANITY[precision.autocast]
            return TF32_SANITY if precision.tf32 and self.candidate.device.type == "cuda" else SANITY[dtype]
        return SANITY[dtype]


def _pool(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """All gradients in one vector, each in units of the largest entry of its true value.

    One tensor's largest error is a matter of luck; the largest over all of them is not. Gradients that vanish but
    for rounding are measured in units of the largest of all.
    """
    largest = max(t.abs().max().item() for t in truth.values() if t.numel())
    parts = []
    for name, wanted in truth.items():
        if wanted.numel():
            scale = wanted.abs().max().item()
            unit = scale if scale > VANISHING * largest else largest
            parts.append(gradients[name].flatten() / unit)
    return torch.cat(parts)


def _flat(value: Any) -> list[Any]:
    """Leaves of nested tuples."""
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in _flat(item)]
    return [value] if isinstance(value, (Tensor, int, float, type(None))) else [id(value)]


def require(check: Check) -> None:
    """Raise AssertionError when a check of `errseg verify` did not pass."""
    if not check.passed:
        raise AssertionError(str(check))


def check(trial: Trial) -> None:
    """Raise AssertionError, with numbers, unless the candidate is right."""
    if trial.target.check is not None:
        trial.target.check(trial)
        return
    outcomes = (trial.of(trial.candidate), trial.of(trial.eager), trial.of(trial.truth))
    trial.compare(*outcomes, of=lambda result: result)
