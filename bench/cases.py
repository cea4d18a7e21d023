"""Sizes at which targets are measured, and the arithmetic and traffic that a size demands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from errseg.model.config import CONFIGS, DecoderConfig

PASSES = ("forward", "backward", "both", "step")


@dataclass(frozen=True)
class Case:
    """One size.

    `model` names the widths ("b", "l" or "small"), `size` is the side of the square input in pixels; maps at 1/16
    have size / 16 pixels a side, logits size / 4. `output` (H, W) is the label map, None for the input's own size.
    """

    model: str = "b"
    batch: int = 1  # B
    classes: int = 48  # K
    words: int = 847  # T
    size: int = 640
    output: tuple[int, int] | None = None
    process_memory: bool = False  # on a CPU: measure the resident memory in a process of its own

    def __post_init__(self) -> None:
        if self.size % 32 or self.size < 32:
            raise ValueError(f"expected a size that is a multiple of 32, got {self.size}")

    @property
    def label(self) -> str:
        """Unique among the cases of a target, e.g. `b B1 K48 T847 640px to 512x683`."""
        to = f" to {self.output[0]}x{self.output[1]}" if self.output else ""
        return f"{self.model} B{self.batch} K{self.kept} T{self.words} {self.size}px{to}"

    @property
    def kept(self) -> int:
        """K, at most T."""
        return min(self.classes, self.words)

    @property
    def decoder(self) -> DecoderConfig:
        """Widths of the decoder, without drop path so that every provider computes the same."""
        from errseg.testing.inputs import SMALL_DECODER

        config = SMALL_DECODER if self.model == "small" else CONFIGS[f"errseg-{self.model}"].decoder
        return replace(config, drop_path_rate=0.0)

    @property
    def os16(self) -> int:
        """Side of a map at 1/16."""
        return self.size // 16

    @property
    def os32(self) -> int:
        """Side of a map at 1/32."""
        return self.size // 32

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the label map."""
        return self.output or (self.size, self.size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        """Inverse of `to_dict`."""
        output = values.get("output")
        return cls(**{**values, "output": tuple(output) if output else None})


def vary(base: Case, **axes: tuple[int, ...]) -> tuple[Case, ...]:
    """`base` with one field changed at a time, e.g. `vary(base, words=(20, 150))`; `base` itself is not repeated."""
    changes: list[dict[str, Any]] = [{axis: value} for axis, values in axes.items() for value in values]
    found = dict.fromkeys(replace(base, **change) for change in changes)
    return tuple(case for case in found if case != base)


@dataclass(frozen=True)
class Counts:
    """What a call cannot do without.

    `matmul`: FLOPs of products and convolutions (a multiplication and an addition are two); `vector`: all other
    arithmetic, one per operation, a transcendental function counted as one; `bytes`: every argument read once and
    every result written once.
    """

    matmul: int = 0
    vector: int = 0
    bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.matmul + other.matmul, self.vector + other.vector, self.bytes + other.bytes)

    @property
    def flops(self) -> int:
        """All arithmetic."""
        return self.matmul + self.vector


def product_counts(passing: str, flops: int, reads: int, writes: int) -> Counts:
    """Counts of something made of products that reads and writes so many bytes in its forward pass.

    Backward: both gradients of each product (twice the FLOPs); arguments and the incoming gradient are read, a
    gradient per argument is written.
    """
    forward = Counts(matmul=flops, bytes=reads + writes)
    backward = Counts(matmul=2 * flops, bytes=reads + writes + reads)
    return {"forward": forward, "backward": backward}.get(passing, forward + backward)


def numel(*shapes: tuple[int, ...]) -> int:
    """Elements of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)
