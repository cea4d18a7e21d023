"""Models of the published code base with this project's forward and loss: `errseg.accelerate` and `errseg.restore`."""

from errseg.accelerated.swap import accelerate, restore

__all__ = ["accelerate", "restore"]
