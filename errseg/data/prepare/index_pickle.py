"""The pickled index of ADE20K, read without running anything that a pickle could ask for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from errseg.errors import ErrSegError

_NDARRAY = object()  # stands for the class, so that no pickle can lay an array over bytes of its choice


def _empty_array(subtype: object, shape: tuple[int, ...], kind: Any) -> Any:
    """Stand-in for `_reconstruct`: an array that the pickle's next step fills."""
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError("an array of another class")
    return np.empty(shape, kind)


def _scalar(kind: np.dtype[Any], content: bytes) -> Any:
    if kind.hasobject:
        raise pickle.UnpicklingError("a scalar that holds objects")
    return np.frombuffer(content, kind, 1)[0]


def _from_buffer(content: Any, kind: np.dtype[Any], shape: tuple[int, ...], order: str) -> Any:
    array = np.frombuffer(content, kind)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand-in for `_codecs.encode`, by which old protocols write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written in {encoding}")
    return text.encode("latin1")


# Dicts, lists, strings and numbers need no name; numpy arrays need these, under the names of old and new numpy.
_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _empty_array
    _KNOWN[f"{_core}.multiarray", "scalar"] = _scalar
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _IndexUnpickler(pickle.Unpickler):
    """Knows numpy arrays and refuses every other type or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an index has no need of")
        return _KNOWN[module, name]


def load_index(path: Path) -> Any:
    """The object in a pickle of plain values and numpy arrays.

    Raises:
        ErrSegError: naming the file, when it is damaged or asks for any other type.
    """
    try:
        with path.open("rb") as file:
            return _IndexUnpickler(file).load()
    except OSError as error:
        raise ErrSegError(f"{path}: cannot read it ({error.strerror or error})") from error
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, TypeError) as error:
        raise ErrSegError(f"{path}: refused or damaged pickle: {error or type(error).__name__}") from error
    except (ValueError, ImportError, MemoryError) as error:
        raise ErrSegError(f"{path}: damaged pickle ({error or type(error).__name__})") from error
