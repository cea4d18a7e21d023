"""Vocabularies: words, their synonyms and, once built, their text embeddings."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from errseg import vocabulary_file
from errseg.errors import ErrSegError

Progress = Callable[[int, int], object]  # (done, in all)

SYNONYM_RULES = ("first", "mean")
_CHECK_ROWS = 65_536
_BUILD_ROWS = 2048  # encoded, and written, at a time


class Vocabulary:
    """The words a picture is segmented into; equal words may occur more than once.

    Args:
        words: names, lists of synonyms, or {name: [further synonyms]}. A name "a, b, c" in a list is split at
            ", " into synonyms; the first becomes the word.
        embeddings: [T, D] text embeddings of any length but zero, floating-point; given, nothing is encoded.
        synonyms: "first" encodes the first synonym only (the published rule), "mean" averages all of them.
        model, weights, prompt: what made the embeddings; a Segmenter with others refuses them. None: unknown.

    Raises:
        ErrSegError: no words, an empty word, a word that is no string, or embeddings of another shape.
    """

    def __init__(
        self,
        words: Iterable[str | Sequence[str]] | Mapping[str, Sequence[str]],
        embeddings: Tensor | np.ndarray | None = None,
        *,
        synonyms: str = "first",
        model: str | None = None,
        weights: str | None = None,
        prompt: str | None = None,
    ) -> None:
        if synonyms not in SYNONYM_RULES:
            raise ErrSegError(f"synonyms: expected one of {', '.join(SYNONYM_RULES)}, got {synonyms!r}")
        self.rule, self.model, self.weights, self.prompt = synonyms, model, weights, prompt
        self.words: list[str] = []
        self._others: dict[int, tuple[str, ...]] = {}  # further synonyms of the words that have them
        for index, names in enumerate(_split(words)):
            self.words.append(names[0])
            if len(names) > 1:
                self._others[index] = names[1:]
        if not self.words:
            raise ErrSegError("the vocabulary is empty: give at least one word")
        self.embeddings = None if embeddings is None else _check_embeddings(embeddings, len(self.words))

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        shown = ", ".join(self.words[:4]) + (", ..." if len(self) > 4 else "")
        width = "no embeddings" if self.embeddings is None else f"embeddings {list(self.embeddings.shape)}"
        return f"Vocabulary({len(self)} words: {shown}; {width})"

    @property
    def synonyms(self) -> list[list[str]]:
        """All names of each word, its own first."""
        return [[word, *self._others.get(index, ())] for index, word in enumerate(self.words)]

    @cached_property
    def key(self) -> str:
        """Digest of words, synonyms and rule: equal for vocabularies that encode to equal embeddings."""
        return hashlib.sha256(self._json() + self.rule.encode()).hexdigest()

    def encode(self, embed: Any) -> Tensor:
        """Return [T, D] embeddings by `embed(phrases) -> [N, D]`, each different phrase encoded once."""
        phrases: dict[str, int] = {}
        first = [phrases.setdefault(word, len(phrases)) for word in self.words]
        if self.rule == "first" or not self._others:
            return _rows(embed(list(phrases)), first)
        groups = {
            index: [phrases.setdefault(name, len(phrases)) for name in names] for index, names in self._others.items()
        }
        encoded = embed(list(phrases))
        embeddings = encoded[torch.tensor(first, device=encoded.device)]
        for index, others in groups.items():
            embeddings[index] = normalize(encoded[[first[index], *others]].mean(0), dim=-1)
        return embeddings

    def check_model(self, model: str, weights: str, prompt: str) -> None:
        """Raise ErrSegError if the embeddings are known to come from another model, weights or prompt."""
        for what, mine, theirs in (
            ("model", self.model, model),
            ("weights", self.weights, weights),
            ("prompt", self.prompt, prompt),
        ):
            if mine is not None and mine != theirs:
                raise ErrSegError(
                    f"the vocabulary's embeddings were made with {what} {mine!r}, here it is {theirs!r}: "
                    "build them again with this model"
                )

    def save(self, path: str | PathLike[str]) -> None:
        """Write words and embeddings as one safetensors file, whole or not at all.

        Raises:
            ErrSegError: there are no embeddings yet, or the file cannot be written.
        """
        if self.embeddings is None:
            raise ErrSegError("the vocabulary has no embeddings to save: build it with Segmenter.embed first")
        metadata = self._metadata(self.model, self.weights, self.prompt)
        vocabulary_file.write(path, self.embeddings, self._json(), metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Vocabulary:
        """Read a saved vocabulary; its embeddings stay memory-mapped, in the dtype that they were saved in.

        Raises:
            ErrSegError: no such file, or not a vocabulary.
        """
        names, embeddings, metadata = vocabulary_file.read(path)
        vocabulary = cls.__new__(cls)  # the words were checked when they were saved
        vocabulary.words = [word if isinstance(word, str) else word[0] for word in names]
        vocabulary._others = {i: tuple(word[1:]) for i, word in enumerate(names) if not isinstance(word, str)}
        vocabulary.rule = metadata.get("synonyms", "first")
        vocabulary.model, vocabulary.weights = metadata.get("model"), metadata.get("weights")
        vocabulary.prompt = metadata.get("prompt")
        _check_shape(embeddings, len(vocabulary))
        vocabulary.embeddings = embeddings
        return vocabulary

    def build(
        self,
        path: str | PathLike[str],
        embed: Callable[[list[str], Progress], Tensor],
        *,
        width: int,
        dtype: torch.dtype,
        model: str,
        weights: str,
        prompt: str,
        progress: Progress | None = None,
    ) -> None:
        """Encode the words a block at a time straight into a file, going on where an earlier call was stopped.

        Equal words get equal rows. Beside the words, one block of embeddings is held. `Segmenter.build_vocabulary`
        fills in everything but the path.

        Args:
            path: the file; until it is complete, `path.partial` holds what is done.
            embed: (phrases, progress) -> [N, D].
            width, dtype: D, and what the file holds.
            model, weights, prompt: what `embed` is made of.
            progress: called with (words done, words in all).

        Raises:
            ErrSegError: `path` or `path.partial` exists and is of other words or another model; nothing can be written.
        """
        first = self._first_alike()
        report = progress or (lambda done, total: None)
        metadata = self._metadata(model, weights, prompt)
        with vocabulary_file.GrowingFile(path, dtype, len(self), width, self._json(), metadata, _BUILD_ROWS) as file:
            report(file.done, len(self))
            while (start := file.done) < len(self):
                block = range(start, min(start + _BUILD_ROWS, len(self)))
                fresh = [i for i in block if first[i] == i]
                rows = torch.empty(len(block), width, dtype=dtype)
                if fresh:
                    encoded = self._encode_some(fresh, embed, partial(_report_from, report, start, len(self)))
                    rows[[i - start for i in fresh]] = encoded.to("cpu", dtype)
                for i in block if len(fresh) < len(block) else ():
                    if first[i] != i:
                        rows[i - start] = rows[first[i] - start] if first[i] >= start else file.row(int(first[i]))
                file.append(rows)
                report(file.done, len(self))
            file.finish()

    def _encode_some(
        self, ids: list[int], embed: Callable[[list[str], Progress], Tensor], report: Callable[[int], object]
    ) -> Tensor:
        """Embeddings of these words, [N, D]; `report` gets the number done."""
        names = [[self.words[i], *self._others.get(i, ())] for i in ids]

        def advance(done: int, total: int) -> None:  # phrases: more than words where synonyms count
            report(done * len(ids) // total)

        return Vocabulary(names, synonyms=self.rule).encode(lambda phrases: embed(phrases, advance))

    def _first_alike(self) -> npt.NDArray[np.int64]:
        """[T] the first word that encodes to the same embedding as each."""
        seen: dict[Any, int] = {}
        mean = self.rule == "mean"
        names = ((word, *self._others[i]) if mean and i in self._others else word for i, word in enumerate(self.words))
        return np.fromiter((seen.setdefault(name, i) for i, name in enumerate(names)), np.int64, len(self))

    def _metadata(self, model: str | None, weights: str | None, prompt: str | None) -> dict[str, str]:
        known = {"model": model, "weights": weights, "prompt": prompt, "synonyms": self.rule, "key": self.key}
        return {name: value for name, value in known.items() if value is not None}

    def _json(self) -> bytes:
        """UTF-8 JSON: a string per word, a list where there are synonyms."""
        names = [[word, *self._others[i]] if i in self._others else word for i, word in enumerate(self.words)]
        return json.dumps(names, ensure_ascii=False).encode()


def _report_from(report: Progress, start: int, total: int, done: int) -> None:
    report(start + done, total)


def parse_words(text: str) -> list[list[str]]:
    """Return the synonyms of each word of "cat, sofa|couch": commas between words, bars between synonyms."""
    return [[name.strip() for name in word.split("|")] for word in text.split(",")]


def read_words(path: str | PathLike[str]) -> list[list[str]]:
    """Return the synonyms of each class of a UTF-8 words file: one class a line, commas between synonyms.

    Blank lines are ignored, and so is a byte order mark.

    Raises:
        ErrSegError: naming the file and line, when it cannot be read, is not UTF-8, or lacks a word.
    """
    return list(iterate_words(path))


def iterate_words(path: str | PathLike[str]) -> Iterator[list[str]]:
    """`read_words`, one class at a time: of a million words `Vocabulary` then holds the only copy."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ErrSegError(f"{path}: cannot read the words file ({error.strerror or error})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ErrSegError(
            f"{path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): "
            "save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ErrSegError(f"{path}: line {line} holds a zero byte: save the file as UTF-8 text")
    del data
    if not text.strip():
        raise ErrSegError(f"{path}: the words file holds no word")
    for number, class_line in enumerate(io.StringIO(text), 1):
        if not class_line.strip():
            continue
        names = [name.strip() for name in class_line.split(",")]
        if "" in names:
            raise ErrSegError(f"{path}: line {number} has an empty word: {class_line.strip()!r}")
        yield names


def _split(words: Any) -> Iterator[tuple[str, ...]]:
    """Yield the names of each word, checked and stripped, its own first and none twice."""
    if isinstance(words, Mapping):
        entries: Iterable[Any] = (
            [name, *([others] if isinstance(others, str) else others)] for name, others in words.items()
        )
    elif isinstance(words, str) or not isinstance(words, Iterable):
        raise ErrSegError(f"expected a list of words or {{name: [synonyms]}}, got {words!r:.60}")
    else:
        entries = words
    for index, entry in enumerate(entries):
        names = entry.split(", ") if isinstance(entry, str) else entry
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ErrSegError(f"word {index}: expected a string, got {entry!r:.60}")
        stripped = tuple(name.strip() for name in names)
        if not stripped or "" in stripped:
            raise ErrSegError(f"word {index} is empty: {entry!r:.60}")
        try:
            "".join(stripped).encode()
        except UnicodeEncodeError as error:  # a command line in another encoding
            raise ErrSegError(f"word {index} is not valid text: {entry!r:.60}; use UTF-8") from error
        yield tuple(dict.fromkeys(stripped))


def _rows(table: Tensor, indices: list[int]) -> Tensor:
    """table[indices], without a copy where that is the whole table in order."""
    if indices == list(range(len(table))):
        return table
    return table[torch.tensor(indices, device=table.device)]


def _check_embeddings(embeddings: Any, num_words: int) -> Tensor:
    tensor = torch.from_numpy(embeddings) if isinstance(embeddings, np.ndarray) else embeddings
    _check_shape(tensor, num_words)
    # In slices: a mask of all of a million embeddings would cost as much memory as they do.
    for start in range(0, num_words, _CHECK_ROWS):
        if not bool(torch.isfinite(tensor[start : start + _CHECK_ROWS]).all()):
            raise ErrSegError(f"embeddings: not finite in the rows from {start}")
    return tensor.detach()


def _check_shape(embeddings: Any, num_words: int) -> None:
    if not isinstance(embeddings, Tensor):
        raise ErrSegError(f"embeddings: expected a tensor [T, D], got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or len(embeddings) != num_words or not embeddings.is_floating_point():
        kind = str(embeddings.dtype).removeprefix("torch.")
        raise ErrSegError(f"embeddings: expected floats [{num_words}, D], got {kind} {list(embeddings.shape)}")
