"""One emulated call in a process under AddressSanitizer: every buffer is allocated with its exact size.

Runs without site packages: a pickled (library, function, arguments) comes in, (message, arguments) goes out.
"""

from __future__ import annotations

import ctypes
import pickle
import sys

library, function, arguments = pickle.load(sys.stdin.buffer)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

passed: list[object] = []
buffers: dict[int, int] = {}
for position, argument in enumerate(arguments):
    if isinstance(argument, bytes):
        buffers[position] = libc.malloc(len(argument))
        ctypes.memmove(buffers[position], argument, len(argument))
        passed.append(ctypes.c_void_p(buffers[position]))
    else:
        passed.append(ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument))

entry = getattr(ctypes.CDLL(library), function)
entry.restype = ctypes.c_char_p
message = entry(*passed)
written = [ctypes.string_at(buffers[i], len(a)) if i in buffers else None for i, a in enumerate(arguments)]
pickle.dump((message, written), sys.stdout.buffer)
