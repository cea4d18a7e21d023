"""When Triton is imported, and what is said where it cannot run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from errseg.ops import triton_backend
from errseg.testing.samples import sample


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    triton_backend._find_out.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    triton_backend._find_out.cache_clear()


def test_ops_and_their_reasons_come_without_triton() -> None:
    code = "import sys, errseg.ops as ops; ops.OPS['class_votes'].why_not('triton'); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_interpreter_is_never_taken_for_a_gpu(asked_anew: pytest.MonkeyPatch) -> None:
    asked_anew.setenv("TRITON_INTERPRET", "1")
    for gpu in (False, True):
        asked_anew.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        triton_backend._find_out.cache_clear()
        assert triton_backend.available() == "interpreted"


def test_reasons(asked_anew: pytest.MonkeyPatch) -> None:
    asked_anew.delenv("TRITON_INTERPRET", raising=False)
    asked_anew.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.available() == "needs an NVIDIA GPU"
    asked_anew.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((7, 5), "capability 8.0 or newer, this one has 7.5"), ((9, 0), None)):
        asked_anew.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        triton_backend._find_out.cache_clear()
        assert triton_backend.available() is reason or reason in str(triton_backend.available())
    assert triton_backend.unsupported(torch.ones(1)) == "needs CUDA tensors, got cpu"
    asked_anew.setattr(importlib.util, "find_spec", lambda name: None)
    triton_backend._find_out.cache_clear()
    assert triton_backend.available() == "Triton is not installed (it comes with torch on Linux)"


def test_an_unnamed_backend_is_never_the_interpreter() -> None:
    from errseg import ops

    arguments = sample("class_votes").raw_arguments()
    assert ops.OPS["class_votes"].choose(None, *arguments) != "triton"
