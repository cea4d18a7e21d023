"""Shared by all tests: seeds, threads, golden numbers, poisoned memory, executed cases per backend."""

from __future__ import annotations

import functools
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a wrong test
os.environ.pop("ERRSEG_BACKEND", None)  # the order of backends is the tests' choice
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first `import triton`, which reads it

TESTS = Path(__file__).parent
OPS_TESTS = TESTS / "ops"
GOLDEN = TESTS / "golden"


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores; a lone process gains nothing from more than two threads on tensors this small.
    torch.set_num_threads(1 if hasattr(config, "workerinput") else min(2, torch.get_num_threads()))


# ---- state that every test starts from


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.detach().fill_(float("nan")).requires_grad_(tensor.requires_grad)
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return poisoned


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN in tests/ops, so that an unwritten tail is seen."""
    if OPS_TESTS not in request.path.parents:
        return
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask PyTorch for deterministic algorithms, which also poisons memory that native code allocates."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@functools.cache
def _load_golden(name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Return `golden(name)`: fresh copies of the tensors of tests/golden/<name>.safetensors, by name."""
    return lambda name: {key: tensor.clone() for key, tensor in _load_golden(name).items()}


# ---- executed cases per (op, backend)

_executed: Counter[tuple[str, str]] = Counter()
_CASE = "op and backend"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from errseg import ops

    for item in items:
        named = re.fullmatch(r"test_(\w+)\.py", item.path.name)
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if named and named[1] in ops.OPS and OPS_TESTS in item.path.parents and isinstance(backend, str):
            item.user_properties.append((_CASE, [named[1], backend]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        for key, value in report.user_properties:
            if key == _CASE:
                _executed[tuple(value)] += 1


def _ran_all_ops_tests(session: pytest.Session) -> bool:
    """Whether this run was meant to execute every test of tests/ops."""
    config = session.config
    selecting = ("keyword", "markexpr", "lf", "deselect", "collectonly", "ignore", "ignore_glob", "stepwise")
    if any(config.getoption(option, None) for option in selecting) or session.shouldstop or session.shouldfail:
        return False
    here = config.invocation_params.dir
    paths = [(here / arg).resolve() for arg in config.args if "::" not in arg]
    return any(path == OPS_TESTS or path in OPS_TESTS.parents for path in paths)


def _never_executed() -> list[str]:
    """Pairs of op and backend that can run here and of which no case was executed."""
    from errseg import ops

    return [
        f"{op} on {backend}"
        for op, backends in ops.backends().items()
        for backend, reason in backends.items()
        if reason in (None, "interpreted") and not _executed[op, backend]
    ]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workerinput") or exitstatus not in (
        pytest.ExitCode.OK,
        pytest.ExitCode.TESTS_FAILED,
    ):
        return
    missing = _never_executed() if _ran_all_ops_tests(session) else []
    session.config.stash[_MISSING] = missing
    if missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_MISSING: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    if _executed:
        terminalreporter.section("executed cases per op and backend")
        known = ("reference", "cpu", "triton", "cuda")
        backends = [*known, *sorted({backend for _, backend in _executed} - set(known))]
        write("".join([f"{'':<20}", *(f"{backend:>11}" for backend in backends)]))
        for op in sorted({op for op, _ in _executed}):
            write("".join([f"{op:<20}", *(f"{_executed[op, b] or '-':>11}" for b in backends)]))
    for pair in config.stash.get(_MISSING, []):
        write(f"FAILED: no test executed {pair}, which can run here", red=True)
