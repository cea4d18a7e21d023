"""Parameters that ops take composed: anew in every call, or once and for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Foldable(nn.Module):
    """Published parameters that an op composes before it uses them.

    They are composed in every call, so that gradients arrive at them. After :meth:`keep_folded` the composition is
    kept, for inference: until the parameters are loaded, moved or trained again, and then made in every call as before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folded: Any = None

    def published_params(self, *norms: nn.LayerNorm) -> Any:
        """The published tensors as the op takes them, with the LayerNorms that stand before them."""
        raise NotImplementedError

    def params(self, *norms: nn.LayerNorm) -> Any:
        """What the op is given: the published tensors, or what was made of them."""
        return self.published_params(*norms) if self._folded is None else self._folded

    @property
    def place(self) -> int | None:
        """The address of what is kept composed; None when nothing is."""
        return None if self._folded is None else next(_tensors(self._folded)).data_ptr()

    @torch.no_grad()
    def keep_folded(self, *norms: nn.LayerNorm) -> None:
        """Compose once, in the precision of the parameters."""
        published = self.published_params(*norms)
        like = next(t for t in vars(published).values() if isinstance(t, Tensor))
        self._folded = _cast(published.fold(), like.dtype)

    def train(self, mode: bool = True) -> Foldable:
        """As in PyTorch; training needs the published parameters."""
        if mode:
            self._folded = None
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._folded = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._folded = None
        super()._load_from_state_dict(*args, **kwargs)


def _tensors(folded: Any) -> Iterator[Tensor]:
    if isinstance(folded, Tensor):
        yield folded
    elif folded is not None:
        for part in folded:
            yield from _tensors(part)


def _cast(folded: Any, dtype: torch.dtype) -> Any:
    """Every tensor of a tuple of tensors and tuples, contiguous and without gradient; None stays None."""
    if folded is None:
        return None
    if isinstance(folded, Tensor):
        return folded.detach().to(dtype).contiguous()
    return type(folded)(*(_cast(part, dtype) for part in folded))
