"""In which precision a row is measured: stated, set, and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from errseg.errors import ErrSegError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = (*DTYPES, "autocast-bfloat16", "autocast-float16")


@dataclass(frozen=True)
class Precision:
    """`name` is the dtype of all tensors, or `autocast-<dtype>` over float32 tensors; `tf32` allows TF32 products."""

    name: str
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ErrSegError(f"no precision {self.name!r}: choose out of {', '.join(NAMES)}")

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of products under autocast, None without."""
        kind, _, name = self.name.rpartition("-")
        return DTYPES[name] if kind else None

    @property
    def tensors(self) -> torch.dtype:
        """The dtype of arguments and parameters."""
        return torch.float32 if self.autocast else DTYPES[self.name]

    @property
    def products(self) -> torch.dtype:
        """The dtype in which products are taken."""
        return self.autocast or self.tensors

    @property
    def itemsize(self) -> int:
        """Bytes per element of arguments and results."""
        return self.tensors.itemsize

    @contextlib.contextmanager
    def active(self, device: str) -> Iterator[None]:
        """Set the flags for as long as the context lasts."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        casting = torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext()
        try:
            with casting:
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


EXACT = Precision("float32")
