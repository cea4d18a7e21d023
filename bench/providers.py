"""Who computes a target: an implementation, a choice of backends, eager or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from errseg import ops
from errseg.bench.cases import Case
from errseg.bench.registry import Implementation, Target
from errseg.errors import ErrSegError

COMPILE = "+compile"
GRAPH = "+graph"
BACKENDS_ON = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Provider:
    """A name, and what it stands for at one target."""

    name: str
    implementation: str
    backends: tuple[str, ...]  # preferred in this order
    compiled: bool = False
    graphed: bool = False  # CUDA graph replay of the forward pass
    unavailable: str | None = None  # the reason

    def build(self, target: Target, case: Case, official: Path | None = None) -> Implementation:
        """The implementation at a size, its function wrapped by the compiler where wanted."""
        if self.implementation == "official":
            from errseg.bench.official import implementation

            assert official is not None
            built = implementation(target.name, case, official)
        else:
            built = target.implementations[self.implementation](case)
        return replace(built, run=torch.compile(built.run, dynamic=False)) if self.compiled else built


def default_names(target: Target, device: str, compiled: bool, official: bool) -> list[str]:
    """Every provider that can run here, with its compiled variant where wanted."""
    names = [name for name in target.implementations if name != "errseg"]
    eager = [*names[:1], "reference", *names[1:]]
    if compiled:
        eager = [variant for name in eager for variant in (name, name + COMPILE)]
    if official and find_provider("official", target, device, True).unavailable is None:
        eager.insert(0, "official")
    backends = [b for b in BACKENDS_ON[device] if _reason(target, b) is None]
    return [*eager, *backends, *(["default"] if target.mixed and len(backends) > 1 else [])]


def find_provider(name: str, target: Target, device: str, official: bool) -> Provider:
    """What a name means at a target; raises ErrSegError for a name that means nothing anywhere."""
    base, compiled, graphed = name, name.endswith(COMPILE), name.endswith(GRAPH)
    base = name.removesuffix(COMPILE).removesuffix(GRAPH)
    provider = Provider(name, base, ("reference",), compiled, graphed)
    if graphed and device != "cuda":
        return replace(provider, unavailable="CUDA graphs need a GPU")
    if base == "official":
        from errseg.bench.official import TARGETS

        here = None if target.name in TARGETS else f"{target.name} has no official"
        return replace(provider, unavailable=here if official else "needs --official CHECKOUT")
    if base in target.implementations and base != "errseg":
        return provider
    provider = replace(provider, implementation="errseg")
    if base == "reference":
        return provider
    if base == "default":
        return replace(provider, backends=ops.contract.DEFAULT_ORDER[device])
    if base in ops.BACKENDS:
        backends = (base, "reference") if target.mixed else (base,)
        return replace(provider, backends=backends, unavailable=_reason(target, base, device))
    if base in _known_baselines():
        return replace(provider, unavailable=f"{target.name} has no {base}")
    raise ErrSegError(f"no provider {name!r}: choose out of {', '.join(_known_names())}")


def _known_baselines() -> tuple[str, ...]:
    return ("published", "eager", "matmul+topk")


def _known_names() -> Sequence[str]:
    return (*_known_baselines(), "reference", *ops.BACKENDS[1:], "default", "official", "and any of them +compile")


def _reason(target: Target, backend: str, device: str | None = None) -> str | None:
    """Why a backend cannot be timed: the reasons of all ops, when no op has it."""
    if device is not None and backend not in BACKENDS_ON[device]:
        return f"{backend} does not run on {device} tensors"
    reasons = {op: ops.OPS[op].why_not(backend) for op in target.ops}
    if None in reasons.values():
        return None
    shared = set(reasons.values())
    if shared == {ops.contract.INTERPRETED}:
        return "interpreted Triton is not timed"
    return "; ".join(sorted(str(reason) for reason in shared))


def backends_used(target: Target, provider: Provider) -> dict[str, str]:
    """Which backend each op of a target takes, where it is not the reference for all."""
    if provider.implementation != "errseg":
        return {}
    return {
        op: next((b for b in provider.backends if ops.OPS[op].why_not(b) is None), "reference") for op in target.ops
    }
