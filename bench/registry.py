"""What can be measured: one file in `targets/` per target, found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from errseg.bench.cases import Case, Counts
from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from errseg.bench.gate import Trial

Inputs = tuple[Any, ...]
BUILT_OF_OPS = (
    *("post", "loss", "rrhc", "spatial_block", "class_block", "prompts"),
    *("head", "labels", "model", "train"),
)


class TooLarge(ErrSegError):
    """Raised by `prepare` for what this machine has no memory for: the row says so and is no failure."""


def _same(value: Any) -> Any:
    return value


def _no_weights(module: nn.Module) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Implementation:
    """One way to compute a target.

    `run(*prepare(inputs))` is the computation; `prepare` brings the target's arguments into this one's layout and
    `canonical` its result into the target's, neither of them timed and both differentiable. With a `module`, which
    has the parameters, `run` takes it first. `run` keeps no state, so that it is compiled once for all inputs.
    """

    run: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] = _same
    canonical: Callable[[Any], Any] = _same
    module: nn.Module | None = None
    weights: Callable[[nn.Module], dict[str, Tensor]] = _no_weights  # parameters by published name


@dataclass(frozen=True)
class Bar:
    """A promise: `provider` is `times` as fast as `over`, or needs at most `peak_bytes` on top of its arguments."""

    case: Case
    passing: str
    provider: str
    over: str = ""
    times: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Target:
    """Something to measure.

    Args:
        name: unique; an op's own name for an op.
        ops: the ops that it runs; their backends are its providers.
        cases: measured by default.
        quick: one small case that takes seconds.
        sweeps: more cases for curves over T, K, B and size.
        inputs: (case, seed) to arguments, float32 on the CPU, values that bfloat16 holds exactly.
        implementations: "errseg" and "published", and further eager baselines by name.
        counts: (case, bytes per element, pass) to what the call cannot do without.
        passes: measured by default; "forward" runs without gradients, "both" is a forward pass that keeps what it
            needs and the backward pass after it, "backward" the latter's share, "step" one optimizer step.
        differentiate: the part of a result that gradients are taken of.
        check: the correctness gate; raises AssertionError. None: results and gradients within the eager budget.
        kinked: ReLU6 is inside, so that rounding decides about single entries of gradients; these need not be within
            the eager budget, only what rounding explains.
        floor: error that is allowed whatever eager code achieves (for scalars, where luck decides).
        mixed: backends stand in for one another; a provider runs what it has and the reference does the rest.
        bars: promises to report on.
    """

    name: str
    ops: tuple[str, ...]
    cases: tuple[Case, ...]
    quick: Case
    inputs: Callable[[Case, int], Inputs]
    implementations: Mapping[str, Callable[[Case], Implementation]]
    counts: Callable[[Case, int, str], Counts]
    sweeps: tuple[Case, ...] = ()
    passes: tuple[str, ...] = ("forward",)
    differentiable: bool = False
    differentiate: Callable[[Any], Tensor] = _same
    check: Callable[[Trial], None] | None = None
    kinked: bool = False
    floor: float = 0.0
    mixed: bool = False
    bars: tuple[Bar, ...] = field(default=())


def target_names() -> list[str]:
    """The ops in alphabetical order, then what is built of them."""
    from errseg.bench import targets

    names = sorted(module.name for module in pkgutil.iter_modules(targets.__path__) if module.name[0] != "_")
    return sorted(names, key=lambda name: BUILT_OF_OPS.index(name) if name in BUILT_OF_OPS else -1)


def find_target(name: str) -> Target:
    """The target of that name; raises ErrSegError naming the known ones."""
    if name not in target_names():
        raise ErrSegError(f"no benchmark {name!r}: choose out of {', '.join(target_names())}")
    target: Target = importlib.import_module(f"errseg.bench.targets.{name}").TARGET
    return target
