"""CLIP's byte-pair tokenizer, whole or reduced to the ids that a small model keeps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from errseg.errors import ErrSegError

CLIP_VOCABULARY = 49408


def import_open_clip() -> ModuleType:
    """open_clip with timm, or ErrSegError saying what to install."""
    try:
        import open_clip
        import timm  # noqa: F401  (open_clip itself only complains when a model is built)
    # A torchvision built for another torch raises RuntimeError: operator torchvision::nms does not exist.
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("open_clip", "timm"):
            raise ErrSegError(f"{error.name} is missing: pip install open_clip_torch timm") from error
        raise ErrSegError(
            f"open_clip cannot be imported ({error}): install the torchvision that belongs to torch {torch.__version__}"
            " (a CPU-only torch needs the CPU-only torchvision of the same index)"
        ) from error
    return open_clip


@lru_cache(maxsize=1)
def _byte_pairs() -> Any:
    return import_open_clip().SimpleTokenizer()


class Tokenizer:
    """Texts to rows of token ids: start, byte pairs, end, zeros.

    `token_ids`, sorted and ending with CLIP's start and end ids, reduces the vocabulary: ids become positions
    in that list, so the end id stays the largest and pooling at the largest id still finds the end.
    """

    def __init__(self, context_length: int = 77, token_ids: Sequence[int] | None = None) -> None:
        self.context_length = context_length
        self.token_ids = None if token_ids is None else tuple(int(i) for i in token_ids)
        if self.token_ids is not None and (
            list(self.token_ids) != sorted(set(self.token_ids))
            or self.token_ids[-2:] != (CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1)
        ):
            raise ValueError(f"expected sorted token ids that end with 49406, 49407, got {self.token_ids}")
        self._position = {token: i for i, token in enumerate(self.token_ids or ())}

    @property
    def known_words(self) -> list[str] | None:
        """The words of a reduced vocabulary in alphabetical order, None for the whole one."""
        if self.token_ids is None:
            return None
        decoded = (_byte_pairs().decoder[token] for token in self.token_ids[:-2])
        return sorted(token.removesuffix("</w>") for token in decoded if token.endswith("</w>"))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [T, context_length] int64 on the CPU.

        A text that is too long is cut as CLIP does, with a warning; a word that a reduced vocabulary lacks
        raises ErrSegError naming the known words.
        """
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, got the single text {texts!r}")
        pairs = _byte_pairs()
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            tokens = [pairs.sot_token_id, *pairs.encode(text), pairs.eot_token_id]
            if len(tokens) > self.context_length:
                warnings.warn(f"cut after {self.context_length} tokens: {text[:60]!r}...", stacklevel=2)
                tokens = [*tokens[: self.context_length - 1], pairs.eot_token_id]
            if self.token_ids is not None:
                tokens = self._reduce(tokens, text)
            row[: len(tokens)] = torch.tensor(tokens)
        return rows

    def _reduce(self, tokens: list[int], text: str) -> list[int]:
        try:
            return [self._position[token] for token in tokens]
        except KeyError:
            encode = _byte_pairs().encode
            words = dict.fromkeys(text.split())
            unknown = [word for word in words if not self._position.keys() >= set(encode(word))]
            raise ErrSegError(
                f"this model does not know {', '.join(map(repr, unknown)) or repr(text)};"
                f" it knows only the words: {', '.join(self.known_words or [])}"
            ) from None


def prompt_length(tokens: Tensor) -> int:
    """Length of the longest prompt in [T, L], start and end included (reads the values: a sync on a GPU)."""
    return int(tokens.argmax(dim=-1).max()) + 1
