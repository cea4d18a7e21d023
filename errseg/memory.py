"""What the process does with memory that it no longer needs."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation instead of handing it back to the system.

    By default every tensor of more than 32 MB comes as fresh pages, which the system fills with zeros one by one: on
    virtual machines that takes longer than the arithmetic. The setting holds for the whole process, which keeps its
    peak memory from then on.

    Returns:
        whether this system's C library (glibc) knows the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, _LARGEST) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
