"""The file of a vocabulary: one safetensors file with `embeddings` [T, D] first and the `words` behind them.

The rows come first and in order, so that a file under construction is a beginning of the finished one: a build that
was stopped goes on where it ended. The words are a tensor because a safetensors header may not exceed 100 MB.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from errseg.data.labels import replacing
from errseg.errors import ErrSegError

FORMAT = "errseg-vocabulary-1"
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGN = 64  # bytes: where the rows start
_SLICE = 16_384  # rows read or written at a time
_LONGEST_HEADER = 1 << 20
# What a build must share with the one that it continues, and what that is called.
_IDENTITY = {
    "model": "another model",
    "weights": "other weights",
    "prompt": "another prompt",
    "dtype": "another dtype",
    "synonyms": "another rule of synonyms",
    "key": "other words",
}


def read(path: str | PathLike[str]) -> tuple[list[Any], Tensor, dict[str, str]]:
    """Return names (a string, or a list of synonyms, per word), memory-mapped embeddings [T, D] and metadata.

    Raises:
        ErrSegError: no such file, or not a vocabulary.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ErrSegError(f"{path}: no such vocabulary file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ErrSegError(f"{path}: not a vocabulary saved by this project (no {FORMAT} mark)")
            embeddings = file.get_tensor("embeddings")
            names = json.loads(file.get_tensor("words").numpy().tobytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise ErrSegError(f"{path}: damaged vocabulary file ({error})") from error
    return names, embeddings, metadata


def write(path: str | PathLike[str], embeddings: Tensor, words: bytes, metadata: dict[str, str]) -> None:
    """Write a vocabulary, whole or not at all; `words` is the JSON of its names."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        rows, width = embeddings.shape
        file.write(_header(metadata, embeddings.dtype, rows, width, len(words)))
        for some in embeddings.split(_SLICE):
            file.write(_bytes(some))
        file.write(words)


class GrowingFile:
    """`path` under construction as `path.partial`, row by row; the rows of an earlier build are kept.

    A context manager. One process at a time may build a file.

    Args:
        path: the file to be.
        dtype, num_rows, width: of the embeddings.
        words: JSON of the names.
        metadata: of the file, with "key", "model", "weights" and "prompt".
        block: rows that `append` gets at a time; a build goes on from a multiple of it.

    Raises:
        ErrSegError: `path` exists with other contents, the partial file is of another build or in use, or nothing
            can be written there.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        dtype: torch.dtype,
        num_rows: int,
        width: int,
        words: bytes,
        metadata: dict[str, str],
        block: int,
    ) -> None:
        self.path, self.partial = Path(path), Path(f"{path}.partial")
        self.dtype, self.num_rows, self.width, self.block = dtype, num_rows, width, block
        self.words, self.metadata = words, metadata
        self.header = _header(metadata, dtype, num_rows, width, len(words))
        self.row_bytes = width * torch.empty((), dtype=dtype).element_size()
        self.done = 0
        self.complete = self._is_complete()
        self.file: BinaryIO | None = None

    def __enter__(self) -> GrowingFile:
        if self.complete:
            self.done = self.num_rows
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            _lock(self.file, self.partial)
            self._continue()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append(self, rows: Tensor) -> None:
        """Add rows [n, D] behind those that are there."""
        try:
            self._open_file().write(_bytes(rows.to(self.dtype)))
            self._open_file().flush()
        except OSError as error:
            raise self._failure(error) from error
        self.done += len(rows)

    def row(self, index: int) -> Tensor:
        """One of the rows that are there, [D]."""
        return self._read(index, 1)[0]

    def finish(self) -> None:
        """Write the words, and put the file in its place."""
        if self.complete:
            return
        file = self._open_file()
        try:
            file.seek(0, os.SEEK_END)
            file.write(self.words)
            file.flush()
            os.fsync(file.fileno())
            os.replace(self.partial, self.path)
        except OSError as error:
            raise self._failure(error) from error

    def _continue(self) -> None:
        """Count the whole blocks of an earlier build and drop what is behind them."""
        file = self._open_file()
        size = os.fstat(file.fileno()).st_size
        begun = _beginning(file)
        if begun != self.header[: len(begun)]:
            self._refuse(self.partial, begun)
        if len(begun) < len(self.header):
            file.seek(0)
            file.write(self.header)
            file.flush()
        rows = max(0, size - len(self.header)) // self.row_bytes
        self.done = self._sound_rows(rows if rows >= self.num_rows else rows // self.block * self.block)
        file.truncate(len(self.header) + self.done * self.row_bytes)
        file.seek(0, os.SEEK_END)

    def _sound_rows(self, rows: int) -> int:
        """Whole blocks before the first with a row of zeros or no numbers: a power cut leaves such holes."""
        for start in range(0, min(rows, self.num_rows), self.block):
            lengths = self._read(start, min(self.block, self.num_rows - start)).float().norm(dim=1)
            if not bool((lengths.isfinite() & (lengths > 0)).all()):
                return start
        return min(rows, self.num_rows)

    def _read(self, start: int, count: int) -> Tensor:
        fileno = self._open_file().fileno()
        data = os.pread(fileno, count * self.row_bytes, len(self.header) + start * self.row_bytes)
        return torch.frombuffer(bytearray(data), dtype=self.dtype).unflatten(0, (count, self.width))

    def _is_complete(self) -> bool:
        """Whether `path` holds this very vocabulary already; another one there is an error."""
        if not self.path.exists():
            return False
        try:
            with self.path.open("rb") as file:
                begun = _beginning(file)
        except OSError as error:
            raise self._failure(error) from error
        if begun != self.header:
            self._refuse(self.path, begun)
        return True

    def _refuse(self, path: Path, begun: bytes) -> None:
        """Say in what the build that left `path` differs from this one."""
        found, wanted = _identity(begun), _identity(self.header)
        remedy = "delete it or choose another file"
        for field, name in _IDENTITY.items() if found else ():
            if found.get(field) != wanted.get(field):
                values = "" if field == "key" else f" ({found.get(field)!r}, not {wanted.get(field)!r})"
                raise ErrSegError(f"{path} was made with {name}{values}: {remedy}")
        raise ErrSegError(f"{path} is there already and is no vocabulary of these words: {remedy}")

    def _open_file(self) -> BinaryIO:
        if self.file is None:
            raise RuntimeError("the file is not open: use `with`")
        return self.file

    def _close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what cannot be written was reported when it was flushed
                self.file.close()

    def _failure(self, error: OSError) -> ErrSegError:
        kept = f"; {self.done:,} words are kept, the same command goes on from there" if self.done else ""
        return ErrSegError(f"cannot write {self.path}: {error.strerror or error}{kept}")


def _header(metadata: dict[str, str], dtype: torch.dtype, rows: int, width: int, words: int) -> bytes:
    """Length and JSON header of a safetensors file, padded with spaces."""
    if dtype not in _KINDS:
        kind = str(dtype).removeprefix("torch.")
        raise ErrSegError(f"embeddings: expected {', '.join(_KINDS.values())} in a file, got {kind}")
    end = rows * width * torch.empty((), dtype=dtype).element_size()
    header = {
        "__metadata__": {"format": FORMAT} | metadata,
        "embeddings": {"dtype": _KINDS[dtype], "shape": [rows, width], "data_offsets": [0, end]},
        "words": {"dtype": "U8", "shape": [words], "data_offsets": [end, end + words]},
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _beginning(file: BinaryIO) -> bytes:
    """Length and header of a safetensors file, or what there is of them."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))


def _identity(begun: bytes) -> dict[str, str]:
    """What a vocabulary was made of, by its header; nothing when it is none."""
    try:
        header = json.loads(begun[8:])
        found: dict[str, str] = header["__metadata__"] | {"dtype": header["embeddings"]["dtype"]}
    except (ValueError, KeyError, TypeError):
        return {}
    return found if found.get("format") == FORMAT else {}


def _lock(file: BinaryIO, path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ErrSegError(f"{path} is being written by another process") from error


def _bytes(rows: Tensor) -> Any:
    """The numbers of [n, D] as a buffer of bytes, little endian as safetensors has them."""
    return rows.detach().cpu().contiguous().view(torch.uint8).numpy()
