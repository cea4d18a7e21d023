"""How one object changes its class and back: same object, same parameters, same place in the model."""

from __future__ import annotations

from typing import Any

from torch import nn


class Fused(nn.Module):
    """Base of the classes that stand in front of a published one.

    `fused_state` is whatever the subclass keeps beside the module's own attributes. It is no module, so that names and
    order of parameters stay those of the published module.
    """

    fused_state: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled and copied by the two classes that it is made of, since its own has no importable name."""
        made: Any = super().__reduce_ex__(max(2, protocol))
        return (_blank, (published_class(self), _stand_in(self)), *made[2:])


def fuse(module: nn.Module, stand_in: type[Fused], state: Any) -> None:
    """Put `stand_in` in front of the module's class; a module that is fused already gets the new state."""
    module.__class__ = _combined(published_class(module), stand_in)
    assert isinstance(module, Fused)
    module.fused_state = state


def unfuse(module: Fused) -> None:
    """Give the module its own class back."""
    del module.fused_state
    module.__class__ = published_class(module)  # type: ignore[assignment]


def published_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without a stand-in."""
    return type(module).__bases__[1] if isinstance(module, Fused) else type(module)


def _stand_in(module: Fused) -> type[Fused]:
    return type(module).__bases__[0]


def _combined(published: type[nn.Module], stand_in: type[Fused]) -> type[Fused]:
    """One class per pair, for good: objects of it may be anywhere."""
    if (published, stand_in) not in _CLASSES:
        members = {"__module__": published.__module__, "__qualname__": published.__qualname__}
        _CLASSES[published, stand_in] = type(published.__name__, (stand_in, published), members)
    return _CLASSES[published, stand_in]


_CLASSES: dict[tuple[type[nn.Module], type[Fused]], type[Fused]] = {}


def _blank(published: type[nn.Module], stand_in: type[Fused]) -> Fused:
    made = _combined(published, stand_in)
    return made.__new__(made)
