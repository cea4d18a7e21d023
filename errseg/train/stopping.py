"""SIGTERM, which schedulers send before they kill: noted, so that a run can end behind its step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether this process has been told to stop."""

    told = False


@contextmanager
def stop_when_told() -> Iterator[Stop]:
    """Note SIGTERM from here on instead of ending by it; outside the main thread Python has no say in it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(*_: object) -> None:
        stop.told = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent_alone() -> None:
    """In a process that serves another: let SIGTERM of its parent end it, and no other's.

    A scheduler sends it to all processes at once, and its parent may need this one for the step under way.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not everywhere can a process tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
