"""What every op promises: one schema, one fake, one gradient, any number of backends.

An :class:`Op` defines ``errseg::<name>`` (its last argument names the backend) and, per backend, a raw op
``errseg::<name>_<backend>`` that does the arithmetic. The reference is written in PyTorch operators and stays
transparent to autograd, autocast and ``torch.compile``; every other backend is opaque, so its raw op carries the
fake implementation and the gradient that the contract gives it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errseg.errors import ErrSegError
from errseg.ops.precision import without_autocast

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEFAULT_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
OPS: dict[str, Op] = {}

_library = torch.library.Library("errseg", "FRAGMENT")


class BackendError(ErrSegError, RuntimeError):
    """No requested backend can run the call; the text gives the reason of each."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    ``forward`` takes the op's arguments and returns its results. ``backward`` takes the incoming gradient, the
    op's arguments and a flag per differentiable argument, and returns one gradient per such argument, any tensor
    where the flag is off. C++ backends have neither: their library implements the raw ops; ``trains`` says that
    it has the backward one.

    A backend that saves more than its inputs for the backward pass names those tensors in ``saved``, with
    ``fake_saved`` foretelling them. Its forward then takes one more argument, whether they are wanted, and
    returns the op's results followed by them (empty tensors when unwanted); its backward gets them behind the
    op's arguments. Arguments in ``shape_only`` are not kept: the backward pass gets their shape and dtype over one
    element of memory, without their values.

    ``available`` says why this machine cannot run it at all, ``can_run`` why it cannot take these arguments; both
    answer ``None`` for yes. "interpreted" is an answer too: it runs, but slowly and only where it is asked for.
    """

    forward: Callable[..., Any] | None = None
    backward: Callable[..., Sequence[Tensor]] | None = None
    trains: bool = False
    saved: tuple[str, ...] = ()
    fake_saved: Callable[..., tuple[Tensor, ...]] = lambda *args: ()
    shape_only: tuple[str, ...] = ()
    available: Callable[[], str | None] = lambda: None
    can_run: Callable[..., str | None] = lambda *args: None


INTERPRETED = "interpreted"


@dataclass
class Op:
    """An operator and its rooms.

    Args:
        name: the name it has in every room.
        schema: arguments and results in PyTorch's schema language, without name and backend.
        reference: plain PyTorch on the same arguments; the specification.
        fake: the results' shapes and dtypes as empty tensors.
        differentiable: names of the arguments that gradients reach.
        added: those among them that are only added to the result; the incoming gradient is theirs, uncopied.
        order: preferred backends per device type, fastest first.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    order: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(DEFAULT_ORDER))
    backends: dict[str, Backend] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise ValueError(f"op {self.name!r} is defined twice")
        arguments, results = self.schema.split("->")
        _library.define(f"{self.name}({arguments.strip()[1:-1]}, str backend) ->{results}")
        _library.impl(self.name, self._dispatch, "CompositeImplicitAutograd")
        _library.define(f"{self.name}_reference{self.schema}")
        _library.impl(f"{self.name}_reference", self.reference, "CompositeImplicitAutograd")
        self.backends["reference"] = Backend(forward=self.reference)
        OPS[self.name] = self

    def register(self, name: str, backend: Backend) -> None:
        """Add a backend; its raw op gets the op's fake and, where gradients exist, the op's autograd."""
        if name not in BACKENDS:
            raise ValueError(f"expected a backend out of {', '.join(BACKENDS)}, got {name!r}")
        raw = f"{self.name}_{name}"
        _define(raw, self._raw_schema(backend), backend.forward, lambda *args: self._raw_fake(backend, *args))
        if self.differentiable and (backend.trains or backend.backward is not None):
            self._define_backward(raw, backend)
        if self.differentiable:
            self._register_autograd(raw, backend)
        self.backends[name] = backend

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run on ``backend``, or on the first of the preferred ones that can take these arguments."""
        return self.overload(*args, self.choose(backend, *args))

    @property
    def overload(self) -> Any:
        """The dispatcher op, ``torch.ops.errseg.<name>.default``."""
        return getattr(torch.ops.errseg, self.name).default

    def choose(self, backend: str | None, *args: Any) -> str:
        """The backend that will run; raises :class:`BackendError` with every reason when none can."""
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        candidates = (backend,) if backend else _selected.order or self.order.get(device, ("reference",))
        reasons = []
        for candidate in candidates:
            reason = self.why_not(candidate, *args)
            if reason is None or (reason == INTERPRETED and candidate in (backend, *_selected.order)):
                return candidate
            reasons.append(f"{candidate}: {reason}")
        raise BackendError(f"{self.name} cannot run: {'; '.join(reasons)}")

    def why_not(self, backend: str, *args: Any) -> str | None:
        """``None`` when ``backend`` can run these arguments (or, without any, can run here), else the reason."""
        if backend not in self.backends:
            known = "not a backend" if backend not in BACKENDS else "this op has none"
            return f"{known}, there is {', '.join(self.backends)}"
        available = self.backends[backend].available()
        if args and available in (None, INTERPRETED):
            return self.backends[backend].can_run(*args) or available
        return available

    def _dispatch(self, *args: Any) -> Any:
        *arguments, backend = args
        raw = getattr(torch.ops.errseg, f"{self.name}_{backend}").default
        saved = self.backends[backend].saved
        if not saved:
            return raw(*arguments)
        training = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        results = raw(*arguments, training)[: -len(saved)]
        return results[0] if len(results) == 1 else results

    def _raw_schema(self, backend: Backend) -> str:
        if not backend.saved:
            return self.schema
        arguments, results = self.schema.split("->")
        names = [*results.strip().strip("()").split(","), *(f"Tensor {name}" for name in backend.saved)]
        return f"({arguments.strip()[1:-1]}, bool training) -> ({', '.join(n.strip() for n in names)})"

    def _raw_fake(self, backend: Backend, *args: Any) -> Any:
        if not backend.saved:
            return self.fake(*args)
        *arguments, training = args
        results = self.fake(*arguments)
        saved = backend.fake_saved(*arguments)
        if not training:
            saved = tuple(s.new_empty(0) for s in saved)
        return (*(results if isinstance(results, tuple) else (results,)), *saved)

    def _define_backward(self, raw: str, backend: Backend) -> None:
        arguments = self.schema.split("->")[0].strip()[1:-1]
        saved = "".join(f", Tensor {name}" for name in backend.saved)
        positions = self._positions()

        def fake(grad: Tensor, *args: Any) -> list[Tensor]:
            flags = zip(positions, args[-1], strict=True)
            return [args[p].new_empty(args[p].shape) if n else grad.new_empty(0) for p, n in flags]

        schema = f"(Tensor grad, {arguments}{saved}, bool[] needed) -> Tensor[]"
        _define(f"{raw}_bwd", schema, backend.backward, fake)

    def _positions(self) -> list[int]:
        """Where the differentiable arguments stand."""
        names = [a.name for a in self.overload._schema.arguments]
        return [names.index(name) for name in self.differentiable]

    def _register_autograd(self, raw: str, backend: Backend) -> None:
        positions = self._positions()
        names = [a.name for a in self.overload._schema.arguments if a.name != "backend"]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            inputs = tuple(
                a.new_empty(()).expand(a.shape) if isinstance(a, Tensor) and name in backend.shape_only else a
                for name, a in zip(names, inputs, strict=False)
            )
            saved = output[-len(backend.saved) :] if backend.saved else ()
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)), *saved)
            ctx.others = [None if isinstance(a, Tensor) else a for a in inputs]
            ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]

        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            if not (backend.trains or backend.backward is not None):
                raise NotImplementedError(f"{raw} has no backward pass; ask for another backend when training")
            saved = iter(ctx.saved_tensors)
            arguments = [next(saved) if t else a for t, a in zip(ctx.is_tensor, ctx.others, strict=True)]
            needed = [ctx.needs_input_grad[p] and names[p] not in self.added for p in positions]
            run = getattr(torch.ops.errseg, f"{raw}_bwd").default
            result: list[Any] = [None] * len(ctx.needs_input_grad)
            for p, n, grad in zip(positions, needed, run(grads[0], *arguments, *saved, needed), strict=True):
                added = names[p] in self.added and ctx.needs_input_grad[p]
                result[p] = grads[0] if added else grad if n else None
            return tuple(result)

        torch.library.register_autograd(f"errseg::{raw}", backward, setup_context=setup_context, lib=_library)


def _define(name: str, schema: str, kernel: Callable[..., Any] | None, fake: Callable[..., Any]) -> None:
    """An opaque op: schema, fake, and a Python kernel, in its arguments' precision, unless a C++ library brings it."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    if kernel is not None:
        _library.impl(name, without_autocast(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"errseg::{name}", fake, lib=_library)


class _Selected:
    """The order of preference that the user set; empty means each op's own."""

    order: tuple[str, ...] = tuple(n.strip() for n in os.environ.get("ERRSEG_BACKEND", "").split(",") if n.strip())


_selected = _Selected()


class use_backend:
    """Prefer these backends, in this order, for every op: from now on, or inside a ``with`` block.

    ``use_backend("cuda", "triton", "reference")`` makes each op take the first that can run; none means
    :class:`BackendError`. Without names every op goes back to its own default order. The setting belongs to the
    process, like PyTorch's own backend flags; ``ERRSEG_BACKEND=cuda,triton,reference`` is its initial value.
    """

    def __init__(self, *names: str) -> None:
        unknown = [name for name in names if name not in BACKENDS]
        if unknown:
            raise BackendError(f"no backend {unknown[0]!r}: choose out of {', '.join(BACKENDS)}")
        self._before = _selected.order
        _selected.order = names

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _selected.order = self._before


def backends() -> dict[str, dict[str, str | None]]:
    """Per op and backend: ``None`` where it runs on this machine, else the reason why it cannot."""
    return {name: {b: op.why_not(b) for b in BACKENDS} for name, op in OPS.items()}
