"""The one runner: gate, warm up, time all providers round robin, measure memory, make rows."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from errseg.bench import gate, memory
from errseg.bench.cases import Case
from errseg.bench.clock import Clock, Spread, make_clock, spread
from errseg.bench.gate import Probe, Trial, floating_tensors, random_cotangent
from errseg.bench.precision import Precision
from errseg.bench.providers import COMPILE, Provider, backends_used, find_provider
from errseg.bench.registry import Inputs, Target, TooLarge
from errseg.bench.roofline import Ceilings, floor_ms
from errseg.bench.rows import FAILED, OK, UNAVAILABLE, Row

T = TypeVar("T")

LEARNING_RATE = 1e-4
SLOW = 1.0  # seconds; a slower call is warmed up on one set of inputs only


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `min_rounds`, then on until `seconds` are over or `max_rounds` are done."""

    min_rounds: int = 5
    max_rounds: int = 50
    seconds: float = 10.0
    sets: int = 3  # of inputs, taken in turn


QUICK = Effort(min_rounds=5, max_rounds=5, seconds=0.0)


@dataclass
class Lane:
    """A provider that passed the gate, with its arguments ready for every set of inputs."""

    provider: Provider
    probe: Probe
    arguments: list[Inputs]
    optimizer: torch.optim.Optimizer | None
    replay: list[Callable[[], None]]  # CUDA graphs, one per set
    cotangent: torch.Tensor | None = None  # made in the first backward pass, which is never timed


@dataclass
class Runner:
    """Measures targets on one device in one precision."""

    device: torch.device
    precision: Precision
    effort: Effort = dataclasses.field(default_factory=Effort)
    clock: Clock | None = None
    ceilings: Ceilings | None = None
    run: str = ""
    official: Path | None = None
    say: Callable[[str], None] = lambda text: None

    def measure(self, target: Target, case: Case, names: Sequence[str], passes: Sequence[str]) -> list[Row]:
        """A row per provider and pass; those that are wrong, raise or cannot run say so in theirs."""
        if any(name.endswith(COMPILE) for name in names):
            torch._dynamo.reset()  # nothing that another size left behind
        self.clock = self.clock or make_clock(self.device)
        group = _Group(self, target, case, list(passes))
        lanes = [lane for name in names if (lane := group.admit(name)) is not None]
        times = group.time(lanes)
        return group.rows(times)

    def single(self, target: Target, case: Case, name: str, passing: str) -> Callable[[], Any]:
        """One provider's call without gate and clock, for memory measurements."""
        group = _Group(self, target, case, [passing])
        lane = group.prepare(find_provider(name, target, self.device.type, self.official is not None))

        def call() -> None:
            with lane.probe.scope():
                result: Any = None
                for step in group.steps(lane, passing, 0):
                    result = step(result)

        return call


class _Group:
    """All providers of one target at one size."""

    def __init__(self, runner: Runner, target: Target, case: Case, passes: list[str]) -> None:
        self.runner, self.target, self.case, self.passes = runner, target, case, passes
        self.inputs = [target.inputs(case, seed) for seed in range(runner.effort.sets)]
        self.yardsticks: dict[Any, tuple[Any, Any]] = {}
        self.status: dict[tuple[str, str], tuple[str, str | None]] = {}
        self.peaks: dict[tuple[str, str], tuple[int, str]] = {}
        self.providers: dict[str, Provider] = {}
        self._eager: Probe | None = None
        self._truth: Probe | None = None

    # ---- before timing

    def admit(self, name: str) -> Lane | None:
        """The lane of a provider that can run and is right, else None with the reason noted."""
        provider = find_provider(name, self.target, self.runner.device.type, self.runner.official is not None)
        self.providers[name] = provider
        if provider.unavailable is not None:
            self._note(name, self.passes, UNAVAILABLE, provider.unavailable)
            return None
        self.runner.say(f"checking {name}")
        return self._attempt(provider, lambda: self._checked(provider))

    def _checked(self, provider: Provider) -> Lane:
        probe = self.probe(provider)
        gate.check(self.trial(probe))
        return self.prepare(provider, probe)

    def probe(self, provider: Provider, exact: bool = False) -> Probe:
        """The provider's implementation at this size, in float64 where it has to be exact."""
        return Probe(
            self.target,
            provider.implementation,
            provider.build(self.target, self.case, self.runner.official),
            provider.backends,
            self.runner.device,
            None if exact else self.runner.precision,
            provider.compiled,
        )

    def trial(self, candidate: Probe) -> Trial:
        """The candidate between eager code of its precision and the float64 reference."""
        if self._eager is None or self._truth is None:
            self._eager = self.probe(self._named("published"))
            self._truth = self.probe(self._named("reference"), exact=True)
        gradients = self.target.differentiable and any(p != "forward" for p in self.passes)
        return Trial(self.target, candidate, self._eager, self._truth, self.inputs[0], gradients, self.yardsticks)

    def _named(self, name: str) -> Provider:
        return find_provider(name, self.target, self.runner.device.type, False)

    def prepare(self, provider: Provider, probe: Probe | None = None) -> Lane:
        """Arguments in the provider's layout for every set of inputs; the optimizer, CUDA graphs where wanted."""
        probe = probe or self.probe(provider)
        needs_grad = any(p in ("backward", "both") for p in self.passes)
        with probe.scope(), torch.set_grad_enabled(needs_grad):
            arguments = [probe.arguments(probe.convert(inputs, needs_grad)) for inputs in self.inputs]
        optimizer = None
        if "step" in self.passes and probe.module is not None:
            optimizer = torch.optim.AdamW(probe.module.parameters(), lr=LEARNING_RATE)
        replay = [_graph(probe, a) for a in arguments] if provider.graphed else []
        return Lane(provider, probe, arguments, optimizer, replay)

    # ---- timing

    def time(self, lanes: list[Lane]) -> dict[str, dict[str, list[float]]]:
        """Milliseconds per provider and pass, one entry per round; lanes that raise are dropped."""
        lanes = [lane for lane in lanes if self._attempt(lane.provider, functools.partial(self._warm_up, lane))]
        self.runner.say(f"timing {', '.join(lane.provider.name for lane in lanes)}" if lanes else "nothing to time")
        times: dict[str, dict[str, list[float]]] = {lane.provider.name: {} for lane in lanes}
        effort, start, done = self.runner.effort, time.perf_counter(), 0
        while lanes and done < effort.max_rounds:
            if done >= effort.min_rounds and time.perf_counter() - start > effort.seconds:
                break
            for lane in list(lanes):
                found = self._attempt(lane.provider, functools.partial(self._round, lane, done % effort.sets))
                if found is None:
                    lanes.remove(lane)
                    del times[lane.provider.name]
                    continue
                for passing, value in found.items():
                    times[lane.provider.name].setdefault(passing, []).append(value)
            done += 1
        for lane in lanes:
            self._attempt(lane.provider, functools.partial(self._measure_memory, lane))
        return {name: values for name, values in times.items() if (name, self.passes[0]) not in self.status}

    def _warm_up(self, lane: Lane) -> bool:
        """Goes through every pass and says so; compilation happens here."""
        for index in range(self.runner.effort.sets):
            start = time.perf_counter()
            self._round(lane, index)
            if time.perf_counter() - start > SLOW and not lane.provider.compiled:
                break
        return True

    def _round(self, lane: Lane, index: int) -> dict[str, float]:
        """Every pass once; forward and backward of a training pass come from one execution."""
        assert self.runner.clock is not None
        found: dict[str, float] = {}
        with lane.probe.scope():
            for passing in ("forward", "step"):
                if passing in self.passes:
                    found[passing] = sum(self.runner.clock.time(*self.steps(lane, passing, index)))
            if "backward" in self.passes or "both" in self.passes:
                forward, backward = self.runner.clock.time(*self.steps(lane, "both", index))
                found |= {"backward": backward, "both": forward + backward}
        return {passing: found[passing] for passing in self.passes}

    def steps(self, lane: Lane, passing: str, index: int) -> list[Callable[[Any], Any]]:
        """The timed steps of a pass on one set of inputs."""
        probe, arguments = lane.probe, lane.arguments[index]
        run = probe.implementation.run
        if lane.replay:
            return [lambda _: lane.replay[index]()]
        if passing == "forward":

            def forward(_: Any) -> Any:
                with torch.no_grad():
                    return run(*arguments)

            return [forward]
        if passing == "step":
            assert lane.optimizer is not None
            return [lambda _: _optimizer_step(self.target, lane.optimizer, run, arguments)]
        leaves = _differentiated(arguments)

        def backward(result: Any) -> Any:
            value = self.target.differentiate(result)
            if lane.cotangent is None:
                lane.cotangent = random_cotangent(value)
            return torch.autograd.grad(value, leaves, lane.cotangent, allow_unused=True)

        return [lambda _: run(*arguments), backward]

    # ---- memory and rows

    def _measure_memory(self, lane: Lane) -> None:
        for passing in self.passes:
            if passing == "backward" or lane.replay:
                continue  # part of "both"; a graph has its own pool

            def call(passing: str = passing) -> None:
                result: Any = None
                with lane.probe.scope():
                    for step in self.steps(lane, passing, 0):
                        result = step(result)

            peak: tuple[int, str]
            if self.runner.device.type == "cuda":
                peak = memory.cuda_peak(call, self.runner.device), "cuda allocator"
            elif self.case.process_memory:
                self.runner.say(f"memory of {lane.provider.name}, {passing}")
                peak = memory.process_peak(self._specification(lane.provider.name, passing)), "process"
            elif not lane.provider.compiled:
                peak = memory.storage_peak(call), "storages"
            else:
                continue
            self.peaks[lane.provider.name, passing] = peak

    def _specification(self, name: str, passing: str) -> dict[str, Any]:
        precision = self.runner.precision
        return {
            "target": self.target.name,
            "case": self.case.to_dict(),
            "provider": name,
            "passing": passing,
            "precision": precision.name,
            "tf32": precision.tf32,
        }

    def rows(self, times: dict[str, dict[str, list[float]]]) -> list[Row]:
        """One row per provider and pass, in the order of the providers."""
        return [self._row(name, passing, times) for passing in self.passes for name in self.providers]

    def _row(self, name: str, passing: str, times: dict[str, dict[str, list[float]]]) -> Row:
        precision = self.runner.precision
        status, reason = self.status.get((name, passing), (OK, None))
        row = Row(
            run=self.runner.run,
            target=self.target.name,
            case=self.case.to_dict(),
            label=self.case.label,
            provider=name,
            passing=passing,
            precision=precision.name,
            tf32=precision.tf32,
            device=self.runner.device.type,
            status=status,
            reason=reason,
            backends=backends_used(self.target, self.providers[name]),
        )
        if status != OK:
            return row
        own = times[name][passing]
        taken = spread(own)
        counts = self.target.counts(self.case, precision.itemsize, passing)
        floor = floor_ms(counts, self.runner.ceilings) if self.runner.ceilings else None
        published, reference = (
            _speedup(times[other][passing], own) if other in times else None for other in ("published", "reference")
        )
        first = published or reference
        peak, peak_by = self.peaks.get((name, passing), (None, None))
        return dataclasses.replace(
            row,
            median_ms=taken.median,
            q1_ms=taken.q1,
            q3_ms=taken.q3,
            rounds=taken.count,
            speedup_published=published.median if published else None,
            speedup_reference=reference.median if reference else None,
            speedup_quartiles=(first.q1, first.q3) if first else None,
            peak_bytes=peak,
            peak_by=peak_by,
            matmul_flops=counts.matmul,
            vector_flops=counts.vector,
            bytes=counts.bytes,
            floor_ms=floor,
            roofline_share=floor / taken.median if floor is not None else None,
        )

    def _attempt(self, provider: Provider, action: Callable[[], T]) -> T | None:
        """What the action returns; None, with a failed row, for whatever a provider raises."""
        try:
            return action()
        except TooLarge as error:
            self._note(provider.name, self.passes, UNAVAILABLE, str(error))
        except Exception as error:  # any error of any backend is a failed row
            text = " ".join(str(error).split())[:400]
            self._note(provider.name, self.passes, FAILED, f"{type(error).__name__}: {text}" if text else repr(error))
            if self.runner.device.type == "cuda":
                torch.cuda.empty_cache()
        return None

    def _note(self, name: str, passes: Sequence[str], status: str, reason: str) -> None:
        self.status |= {(name, passing): (status, reason) for passing in passes}
        self.runner.say(f"{name}: {status}: {reason}")


def _speedup(other: list[float], own: list[float]) -> Spread:
    """Round by round, so that noise which hits both cancels."""
    return spread([theirs / mine for theirs, mine in zip(other, own, strict=True)])


def _differentiated(arguments: Inputs) -> list[torch.Tensor]:
    """Tensors and parameters in a provider's arguments that gradients reach."""
    modules = [a for a in arguments if isinstance(a, nn.Module)]
    tensors = floating_tensors(tuple(a for a in arguments if not isinstance(a, nn.Module)))
    for module in modules:
        tensors += [p for m in module.modules() for p in m._parameters.values() if p is not None]
    return [t for t in tensors if t.requires_grad]


def _optimizer_step(target: Target, optimizer: Any, run: Callable[..., Any], arguments: Inputs) -> Any:
    optimizer.zero_grad(set_to_none=True)
    loss = target.differentiate(run(*arguments))
    loss.backward()
    optimizer.step()
    return loss.detach()


def _graph(probe: Probe, arguments: Inputs) -> Callable[[], None]:
    """The forward pass captured into a CUDA graph; raises where the call synchronises with the host."""
    side = torch.cuda.Stream(probe.device)
    graph = torch.cuda.CUDAGraph()
    with probe.scope(), torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                probe.implementation.run(*arguments)
        torch.cuda.current_stream(probe.device).wait_stream(side)
        with torch.cuda.graph(graph):
            probe.implementation.run(*arguments)
    return graph.replay
