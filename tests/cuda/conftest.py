"""Emulated kernels, compiled once and kept in pytest's cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.cuda import emulated

UNUSED = 7 * 24 * 3600.0  # seconds after which a kernel that no test asked for leaves the cache


@pytest.fixture(scope="session")
def kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that outlives the session, where pytest keeps a cache."""
    cache_of_pytest = getattr(request.config, "cache", None)  # it can be switched off
    if cache_of_pytest is None:
        return tmp_path_factory.mktemp("cuda-emulator")
    folder = cache_of_pytest.mkdir("cuda-emulator")
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_mtime < time.time() - UNUSED:
            path.unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def emulate(kernel_cache: Path) -> Callable[..., emulated.Emulated]:
    """Return `emulate(driver, sanitized=False, edits=None)`."""
    if reason := emulated.why_not():
        pytest.skip(reason)

    @cache
    def build(driver: str, sanitized: bool, edits: tuple[tuple[str, tuple[str, str]], ...]) -> emulated.Emulated:
        return emulated.Emulated(driver, kernel_cache, sanitized=sanitized, edits=dict(edits))

    def emulate(
        driver: str, *, sanitized: bool = False, edits: dict[str, tuple[str, str]] | None = None
    ) -> emulated.Emulated:
        return build(driver, sanitized, tuple((edits or {}).items()))

    return emulate
