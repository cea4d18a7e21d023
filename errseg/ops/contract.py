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

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEFAULT_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
OPS: dict[str, Op] = {}

_library = torch.library.Library("errseg", "FRAGMENT")


class BackendError(ErrSegError, RuntimeError):
    """No requested backend can run the call; the text gives the reason of each."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    ``forward`` takes the op's arguments, ``backward`` the incoming gradients, the op's arguments and a flag per
    differentiable argument, and returns one gradient (or ``None`` where the flag is off) per such argument.
    ``available`` says why this machine cannot run it at all, ``can_run`` why it cannot take these arguments;
    both answer ``None`` for yes. C++ backends have no ``forward``: their library implements the raw op.
    """

    forward: Callable[..., Any] | None = None
    backward: Callable[..., Sequence[Tensor | None]] | None = None
    available: Callable[[], str | None] = lambda: None
    can_run: Callable[..., str | None] = lambda *args: None


@dataclass
class Op:
    """An operator and its rooms.

    Args:
        name: the name it has in every room.
        schema: arguments and results in PyTorch's schema language, without name and backend.
        reference: plain PyTorch on the same arguments; the specification.
        fake: the results' shapes and dtypes as empty tensors.
        differentiable: names of the arguments that gradients reach.
        order: preferred backends per device type, fastest first.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
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
        _library.define(f"{raw}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        if backend.forward is not None:
            _library.impl(raw, backend.forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"errseg::{raw}", self.fake, lib=_library)
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
            if reason is None:
                return candidate
            reasons.append(f"{candidate}: {reason}")
        raise BackendError(f"{self.name} cannot run: {'; '.join(reasons)}")

    def why_not(self, backend: str, *args: Any) -> str | None:
        """``None`` when ``backend`` can run these arguments (or, without any, can run here), else the reason."""
        if backend not in self.backends:
            known = "not a backend" if backend not in BACKENDS else "this op has none"
            return f"{known}, there is {', '.join(self.backends)}"
        reason = self.backends[backend].available()
        if reason is None and args:
            reason = self.backends[backend].can_run(*args)
        return reason

    def _dispatch(self, *args: Any) -> Any:
        *arguments, backend = args
        return getattr(torch.ops.errseg, f"{self.name}_{backend}").default(*arguments)

    def _register_autograd(self, raw: str, backend: Backend) -> None:
        names = [a.name for a in getattr(torch.ops.errseg, raw).default._schema.arguments]
        positions = [names.index(name) for name in self.differentiable]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
            ctx.inputs = [None if isinstance(a, Tensor) else a for a in inputs]
            ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]

        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            if backend.backward is None:
                raise NotImplementedError(f"{raw} has no backward pass; ask for another backend when training")
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if t else a for t, a in zip(ctx.is_tensor, ctx.inputs, strict=True)]
            needed = [ctx.needs_input_grad[p] for p in positions]
            result: list[Any] = [None] * len(inputs)
            for p, grad in zip(positions, backend.backward(*grads, *inputs, needed), strict=True):
                result[p] = grad
            return tuple(result)

        torch.library.register_autograd(f"errseg::{raw}", backward, setup_context=setup_context, lib=_library)


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
